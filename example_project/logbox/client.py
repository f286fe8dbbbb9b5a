"""The client: one line, one answer."""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Self


class LogboxError(Exception):
    """The server refused a line, or went away before it answered."""


class Client:
    """A connection to a logbox server; a context manager."""

    def __init__(self, address: tuple[str, int], timeout: float = 10.0) -> None:
        self._socket = socket.create_connection(address, timeout)
        self._answers = self._socket.makefile("r", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None) -> None:
        self._answers.close()
        self._socket.close()

    def send(self, line: str) -> None:
        """Return when the line is on stable storage; raises LogboxError where the server could not keep it."""
        if "\n" in line:
            raise ValueError("a log line has no newline in it")
        self._socket.sendall(line.encode() + b"\n")
        answer = self._answers.readline()
        if not answer.endswith("\n"):
            raise LogboxError("the server closed the connection before it answered")
        if answer != "OK\n":
            raise LogboxError(answer.removeprefix("ERR ").strip())

"""The client alone: no VM is booted for these."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from logbox import Client, LogboxError


@pytest.fixture
def server_that_answers() -> Iterator[Callable[[bytes], tuple[str, int]]]:
    """Make a server on loopback that reads one line, sends the given bytes and closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = []

        def start(answer: bytes) -> tuple[str, int]:
            def serve() -> None:
                connection, _peer = listener.accept()
                with connection, connection.makefile("rb") as lines:
                    lines.readline()
                    connection.sendall(answer)

            threads.append(threading.Thread(target=serve, daemon=True))
            threads[-1].start()
            host, port = listener.getsockname()
            return host, port

        yield start
        for thread in threads:
            thread.join(5)


def test_an_acknowledged_line_returns(server_that_answers: Callable[[bytes], tuple[str, int]]) -> None:
    with Client(server_that_answers(b"OK\n")) as client:
        client.send("hello")


def test_a_refused_line_raises_the_reason(server_that_answers: Callable[[bytes], tuple[str, int]]) -> None:
    with Client(server_that_answers(b"ERR no space\n")) as client, pytest.raises(LogboxError, match=r"^no space$"):
        client.send("hello")


@pytest.mark.parametrize("answer", [b"", b"O", b"OK"], ids=["nothing", "half", "no newline"])
def test_a_server_that_goes_away_has_acknowledged_nothing(
    server_that_answers: Callable[[bytes], tuple[str, int]], answer: bytes
) -> None:
    with Client(server_that_answers(answer)) as client, pytest.raises(LogboxError, match="before it answered"):
        client.send("hello")


def test_a_newline_cannot_smuggle_a_second_line(server_that_answers: Callable[[bytes], tuple[str, int]]) -> None:
    with Client(server_that_answers(b"OK\n")) as client:
        with pytest.raises(ValueError, match="no newline"):
            client.send("one\ntwo")
        client.send("three")

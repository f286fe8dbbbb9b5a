"""Bytes in and out of a guest by a faster way than its console, where it has one: its network, else vsock.

The guest listens, for one connection that says a random token, and gives it to a command as its input and output. Where none of
that works (no network and no vsock, another processor, a firewall), who asked goes on over the console.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from types import TracebackType
from typing import Self

from pytest_chvm.base.deadline import Deadline, checked_timeout, poll_until
from pytest_chvm.base.untouched import Socket, random_below, random_bytes
from pytest_chvm.errors import CommandTimeoutError, UnsupportedError, VmError, VmIOError
from pytest_chvm.guest import carry
from pytest_chvm.guest.channels import Process, StartingChannel
from pytest_chvm.guest.elf import WRITTEN_FOR
from pytest_chvm.machine.machine import Machine

FIRST_PORT, LAST_PORT = 49_152, 65_535
# Until the guest listens, and until it answers to the token.
START_TIMEOUT_S, CONNECT_TIMEOUT_S = 20.0, 5.0
# Of ports, each refused by the guest since something listens there.
ATTEMPTS = 3
READ_SIZE = 1 << 18
# What a shell says of a program that is not there.
NOT_THERE = 127


@dataclass(eq=False)
class Carrier:
    """The faster ways into one VM; `address` returns where a TCP port of the guest's is reached. Any thread may use it."""

    machine: Machine
    address: Callable[[int], tuple[str, int]]
    # Those that have not failed yet.
    _ways: list[str] = field(default_factory=lambda: ["tcp", "vsock"])
    # Ports that were used before and are free again, of each way.
    _ports: dict[str, list[int]] = field(default_factory=dict)
    _program: str | None = None
    _lock: Lock = field(default_factory=Lock)

    def open(self, script: str, timeout: float | None) -> Carried | None:
        """Have the guest run a script, whose input and output are what is sent and received; None where nothing carries that.

        `timeout`: CommandTimeoutError after so many seconds without progress. Raises what has become of the guest when it dies.
        """
        with self._lock:
            if not isinstance(self.machine.channel, StartingChannel):
                self._ways.clear()
            for way in list(self._ways):
                try:
                    return self._open(way, script, checked_timeout(timeout))
                except (VmIOError, UnsupportedError, OSError):
                    # Only where the guest is well: else that is what is to be told.
                    self.machine.check_alive()
                    self._ways.remove(way)
        return None

    def _open(self, way: str, script: str, patience_s: float) -> Carried:
        for _attempt in range(ATTEMPTS):
            free = self._ports.setdefault(way, [])
            port = free.pop() if free else FIRST_PORT + random_below(LAST_PORT - FIRST_PORT + 1)
            # Forwards a port where that is to be done, and says whether there is a network at all.
            place = self.address(port) if way == "tcp" else None
            token = random_bytes(carry.TOKEN_SIZE)
            message = carry.tcp_message(port, token) if place else carry.vsock_message(port, token)
            process = self.machine.popen([self._installed(), "/bin/sh", "-c", script], input=message)
            try:
                if not self._listens(process):
                    continue
                stream = _connect(place) if place else self.machine.driver.open_vsock(self.machine.handle, port)
                try:
                    _introduce(stream, token)
                except BaseException:
                    stream.close()
                    raise
            except BaseException:
                process.kill()
                raise
            return Carried(self.machine, stream, process, patience_s, lambda free=free, port=port: free.append(port))  # type: ignore[misc]
        raise VmIOError(f"VM {self.machine.name!r}: the guest refused {ATTEMPTS} ports", vm_name=self.machine.name)

    def _installed(self) -> str:
        """Return where the program is in the guest, once it is there."""
        if self._program is None:
            arch = self.machine.config.architecture
            done = arch.name in WRITTEN_FOR and self.machine.run(carry.INSTALL, timeout=START_TIMEOUT_S, input=carry.program(arch))
            if not done or done.returncode != 0:
                raise UnsupportedError(f"VM {self.machine.name!r}: the guest runs no program of ours", vm_name=self.machine.name)
            self._program = done.stdout.strip()
        return self._program

    def _listens(self, process: Process) -> bool:
        """Tell whether the program listens, or may do so at another port; raises VmIOError where it cannot."""
        deadline, said = Deadline.after(START_TIMEOUT_S), b""
        while not said.endswith(b"\n"):
            piece = process.read("out", deadline)
            said += piece
            if not piece:
                status = process.wait(deadline)
                if status == NOT_THERE:
                    # The guest has started again since.
                    self._program = None
                elif status != carry.REFUSED:
                    raise VmIOError(f"VM {self.machine.name!r}: nothing listens in the guest")
                return False
        return True


def _connect(place: tuple[str, int]) -> socket.socket:
    stream = Socket(socket.AF_INET)
    try:
        stream.settimeout(CONNECT_TIMEOUT_S)
        stream.connect(place)
    except BaseException:
        stream.close()
        raise
    return stream


def _introduce(stream: socket.socket, token: bytes) -> None:
    stream.settimeout(CONNECT_TIMEOUT_S)
    stream.sendall(token)
    said = b""
    while len(said) < len(token):
        piece = stream.recv(len(token) - len(said))
        if not piece:
            raise VmIOError("who listens in the guest does not know the token")
        said += piece
    if said != token:
        raise VmIOError("who listens in the guest does not know the token")
    stream.setblocking(False)


class Carried:
    """A connection to a command in the guest; a context manager that ends the command where it still runs."""

    def __init__(
        self, machine: Machine, stream: socket.socket, process: Process, patience_s: float, give_back: Callable[[], None]
    ) -> None:
        self._machine = machine
        self._stream = stream
        self._process = process
        self._patience_s = patience_s
        self._give_back = give_back

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        self._stream.close()
        try:
            self._process.kill()
            self._give_back()
        except VmError:
            if error is None:
                raise

    def send(self, data: bytes | memoryview) -> None:
        """Send all of it; raises ConnectionError where the command takes no more, CommandTimeoutError where it is stuck."""
        left = memoryview(data)
        while left:
            try:
                left = left[self._stream.send(left) :]
            except BlockingIOError:
                self._await(select.POLLOUT)

    def receive(self, size: int = READ_SIZE) -> bytes:
        """Block until something has come, up to so many bytes of it; empty at the end. Raises as `send` does."""
        while True:
            try:
                return self._stream.recv(size)
            except BlockingIOError:
                self._await(select.POLLIN)

    def end(self) -> tuple[int | None, str]:
        """Tell the command that nothing more comes and block until it has ended; returns its status and standard error."""
        # It may have ended already.
        with suppress(OSError):
            self._stream.shutdown(socket.SHUT_WR)
        deadline = Deadline.after(self._patience_s)
        try:
            status = self._process.wait(deadline)
            said = b""
            while piece := self._process.read("err", deadline):
                said = (said + piece)[-READ_SIZE:]
        except TimeoutError as error:
            raise self._stuck() from error
        return status, said.decode(errors="surrogateescape")

    def _await(self, event: int) -> None:
        deadline = Deadline.after(self._patience_s)
        while True:
            poll = select.poll()
            poll.register(self._stream, event)
            for wake in self._machine.health.wake_fds():
                poll.register(wake, select.POLLIN)
            ready = dict(poll_until(poll, Deadline.after(deadline.wait_s)))
            if self._stream.fileno() in ready:
                return
            self._machine.check_alive()
            if deadline.expired:
                raise self._stuck()

    def _stuck(self) -> CommandTimeoutError:
        name = self._machine.name
        stuck = CommandTimeoutError(
            f"VM {name!r}: the guest took and sent nothing for {self._patience_s:g} s while files were copied", vm_name=name
        )
        self._machine.health.explain(stuck)
        return stuck

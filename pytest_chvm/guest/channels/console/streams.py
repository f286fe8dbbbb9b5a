"""Processes that run in the guest beside the test, over its console: what they print comes as they print it.

Each output is sent in pieces like a command's, of which the guest sends the next one when it is asked for it. Who reads an output,
or waits for the process, moves the bytes; while nobody does, and while much is here that nobody has read, the process has to wait
where it prints, as it does with a pipe.
"""

from __future__ import annotations

from collections.abc import Callable

from pytest_chvm.base.deadline import Deadline
from pytest_chvm.errors import VmIOError
from pytest_chvm.guest.channels.console.console import Console, Stream

SEND_TIMEOUT_S = 10.0
# How often at most bytes are moved at once that are there already.
MOVES_AT_ONCE = 16


class StreamConsole(Console):
    """A console by which processes run beside the test."""

    def has_lost(self, stream: Stream) -> bool:
        """Tell whether nothing more can come of a process, since the console was closed meanwhile."""
        return not stream.is_over and self._answers.get(stream.token.encode()) is not stream

    def take_output(self, stream: Stream, name: bytes, deadline: Deadline) -> bytes:
        """Block until something of an output has come and take it; empty at its end. Raises TimeoutError at the deadline."""
        output = stream.output(name)
        with self._changed:
            self._hear_stream(stream, lambda: bool(output) or name not in stream.still_open, deadline)
            data = bytes(output)
            output.clear()
            if name in stream.held:
                self._send(stream.asks_for_more(name))
        return data

    def wait_status(self, stream: Stream, deadline: Deadline) -> None:
        """Block until a process has ended. Raises TimeoutError at the deadline."""
        with self._changed:
            self._hear_stream(stream, lambda: stream.status is not None, deadline)

    def _hear_stream(self, stream: Stream, done: Callable[[], bool], deadline: Deadline) -> None:
        if done() or self.has_lost(stream):
            return
        try:
            self._hear(stream, done, deadline)
        except VmIOError:
            if stream.error is not None or not self.has_lost(stream):
                raise

    def catch_up(self, stream: Stream) -> None:
        """Move the bytes that are there for a process, without waiting for more."""
        with self._changed:
            for _time in range(MOVES_AT_ONCE):
                if stream.status is not None or self.has_lost(stream) or self._moving:
                    return
                self._moving = True
                try:
                    if not self._move(Deadline.after(0)):
                        return
                finally:
                    self._moving = False
                    self._changed.notify_all()

    def order(self, line: bytes, deadline: Deadline) -> None:
        """Send a line to the guest's loop, which answers nothing. Raises TimeoutError where it does not go in time."""
        with self._changed:
            message = self._send(line)
            self._wait(lambda: message.sent, deadline)


class ConsoleProcess:
    """A process that the guest's console shell has started; see `pytest_chvm.guest.channels.Process`."""

    def __init__(self, console: StreamConsole, stream: Stream) -> None:
        self._console = console
        self._stream = stream

    @property
    def returncode(self) -> int | None:
        """What the shell says of its end, as far as that has come."""
        return self._stream.status

    @property
    def is_lost(self) -> bool:
        """Whether the console was closed before all of it had come."""
        return self._console.has_lost(self._stream)

    def read(self, name: str, deadline: Deadline) -> bytes:
        """Block until something of an output, "out" or "err", has come, and take it; empty at its end, and where it is lost."""
        return self._console.take_output(self._stream, name.encode(), deadline)

    def poll(self) -> int | None:
        """Take what has come by now, without waiting for more; returns the `returncode`."""
        self._console.catch_up(self._stream)
        return self.returncode

    def wait(self, deadline: Deadline) -> int | None:
        """Block until the process has ended; returns the `returncode`, None where it is lost. Raises TimeoutError."""
        self._console.wait_status(self._stream, deadline)
        return self.returncode

    def signal(self, number: int) -> None:
        """Send a signal to the process and to those of its process group."""
        self._order(b"signal %s %d\n" % (self._stream.token.encode(), number))

    def kill(self) -> None:
        """End the process and all that it has started."""
        self._order(b"kill %s\n" % self._stream.token.encode())

    def _order(self, line: bytes) -> None:
        if self._stream.is_over or self.is_lost:
            return
        try:
            self._console.order(line, Deadline.after(SEND_TIMEOUT_S))
        except TimeoutError as error:
            name = self._console.vm_name
            raise VmIOError(
                f"VM {name!r}: its shell took no order for a process within {SEND_TIMEOUT_S:g} s", vm_name=name
            ) from error

"""`GuestProcess`: a process of the guest's that runs while the test goes on."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterator
from threading import Lock
from types import TracebackType
from typing import Self, TypeVar

from pytest_chvm.base.deadline import Deadline, checked_timeout
from pytest_chvm.base.untouched import monotonic_s
from pytest_chvm.errors import CommandTimeoutError, InvalidConfigError, VmError, VmIOError
from pytest_chvm.guest.channels import Process
from pytest_chvm.machine.events import PROCESS_ENDED
from pytest_chvm.machine.machine import Machine

Result = TypeVar("Result")
# Of a line without an end so much is kept, and then handed out as one.
LONGEST_LINE = 1 << 20
# What is not read line by line is kept in memory as a whole.
LARGEST_READ = 256 << 20
KILL_TIMEOUT_S = 10.0
# What the shell says of a process that SIGKILL has ended: it is taken for the end of those that end with their VM.
KILLED = 128 + signal.SIGKILL


class GuestProcess:
    """A process in a VM, as `Vm.popen` returns it; a context manager that ends it. Several threads may use one.

    `stdout` and `stderr` are iterators of its lines as they come. It ends with its VM at the latest: where the test has ended or
    rebooted that, its outputs end, with a `returncode` of 137; a VM that ends of itself raises what has become of it.
    """

    def __init__(self, machine: Machine, process: Process, command: str | tuple[str, ...]) -> None:
        self.command = command
        self.stdout = GuestOutput(self, "out")
        self.stderr = GuestOutput(self, "err")
        self._machine = machine
        self._process = process
        self._started_s = monotonic_s()
        self._watched = machine.splats.begin(str(command))
        self._returncode: int | None = None
        self._lock = Lock()

    def __repr__(self) -> str:
        state = "running" if self._returncode is None else f"returned {self._returncode}"
        return f"<GuestProcess {self.command!r} in {self._machine.name!r}, {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        try:
            if not self._machine.ended:
                self.kill()
                self.wait(KILL_TIMEOUT_S)
        except VmError:
            # What the block has raised says it already.
            if error is None:
                raise

    @property
    def returncode(self) -> int | None:
        """Its exit status as `poll` or `wait` have seen it: 128 + N where signal N ended it; None while it runs."""
        return self._returncode

    def poll(self) -> int | None:
        """Return the `returncode` if it has ended by now, else None. Raises what has become of the guest where it has died."""
        if self._returncode is None:
            self._over(self._asked(self._process.poll, None))
        return self._returncode

    def wait(self, timeout: float | None = None) -> int:
        """Block until it has ended, for `timeout` seconds (None: no limit); returns the `returncode`.

        Raises CommandTimeoutError, after which it still runs; what has become of the guest, at once when it dies. It takes no
        output: a process that prints more than 8 MiB that nobody reads waits for its reader.
        """
        deadline = Deadline.after(checked_timeout(timeout))
        if self._returncode is None:
            try:
                self._over(self._asked(lambda: self._process.wait(deadline), None))
            except TimeoutError as error:
                raise self._late(f"did not end within {deadline.total_s:g} s, and still runs", error) from error
        assert self._returncode is not None
        return self._returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to it and to what it has started in its process group, as Ctrl-C does; nothing once it has ended."""
        try:
            known = signal.Signals(number)
        except ValueError as error:
            raise InvalidConfigError(f"send_signal({number!r}): expected one of the signal module's SIG...") from error
        if self.poll() is None:
            self._asked(lambda: self._process.signal(known), None)

    def terminate(self) -> None:
        """Send SIGTERM, as `send_signal` does."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and all that it has started, at once; `wait` tells when that is done."""
        self._asked(self._process.kill, None)

    def _asked(self, ask: Callable[[], Result], gone: Result) -> Result:
        """Ask the channel; returns `gone` where the test has ended or rebooted the VM, raises where the guest died or is silent."""
        machine = self._machine
        try:
            answer = ask()
        except VmIOError as error:
            if not machine.ended:
                machine.health.explain(error)
                raise
            answer = gone
        if machine.ended or self._process.is_lost:
            if not machine.ended:
                machine.health.check()
            self._over(self._process.returncode if self._process.returncode is not None else KILLED)
        return answer

    def _over(self, returncode: int | None) -> None:
        with self._lock:
            if returncode is None or self._returncode is not None:
                return
            self._returncode = returncode
        self._machine.splats.end(self._watched)
        duration_s = round(monotonic_s() - self._started_s, 3)
        self._machine.log.add(PROCESS_ENDED, command=str(self.command), returncode=returncode, duration_s=duration_s)

    def _read(self, name: str, deadline: Deadline) -> bytes:
        try:
            return self._asked(lambda: self._process.read(name, deadline), b"")
        except TimeoutError as error:
            raise self._late(f"printed no whole line within {deadline.total_s:g} s", error) from error

    def _late(self, what: str, error: TimeoutError) -> CommandTimeoutError:
        if isinstance(error, CommandTimeoutError):
            return error
        name = self._machine.name
        late = CommandTimeoutError(f"VM {name!r}: the process {self.command!r} {what}", vm_name=name)
        if not self._machine.ended:
            self._machine.health.explain(late)
        return late


class GuestOutput(Iterator[str]):
    """One output of a process: an iterator of its lines as they come, each with its end as it was written.

    Text is UTF-8, undecodable bytes by `surrogateescape`. It ends when all that has the output open has ended, or closed it. A line
    of more than 1 MiB comes in parts.
    """

    def __init__(self, process: GuestProcess, name: str) -> None:
        self._process = process
        self._name = name
        self._lines: deque[bytes] = deque()
        self._rest = b""
        self._ended = False
        self._lock = Lock()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = self.readline()
        if not line:
            raise StopIteration
        return line

    def readline(self, timeout: float | None = None) -> str:
        """Block until the next line has come, for `timeout` seconds (None: no limit), and return it; "" at the end.

        Raises CommandTimeoutError, after which the line can still be read; what has become of the guest, at once when it dies.
        """
        deadline = Deadline.after(checked_timeout(timeout))
        with self._lock:
            while not self._lines and not self._ended:
                self._take(deadline)
            line = self._lines.popleft() if self._lines else b""
        return line.decode(errors="surrogateescape")

    def read(self, timeout: float | None = None) -> str:
        """Block until the output has ended, for `timeout` seconds (None: no limit), and return what was not yet read of it.

        Raises as `readline` does, and VmIOError for more than 256 MiB.
        """
        deadline = Deadline.after(checked_timeout(timeout))
        size = 0
        with self._lock:
            while not self._ended:
                size += self._take(deadline)
                if size > LARGEST_READ:
                    raise VmIOError(f"{self._process!r} has printed more than {LARGEST_READ >> 20} MiB: read it line by line")
            data = b"".join(self._lines)
            self._lines.clear()
        return data.decode(errors="surrogateescape")

    def _take(self, deadline: Deadline) -> int:
        """Block until more has come, and sort it into lines; returns how many bytes it was."""
        data = self._process._read(self._name, deadline)
        *lines, rest = _lines(self._rest + data)
        self._lines.extend(lines)
        self._ended = not data
        if rest and (self._ended or len(rest) > LONGEST_LINE):
            self._lines.append(rest)
            rest = b""
        self._rest = rest
        return len(data)


def _lines(data: bytes) -> list[bytes]:
    """Return the lines of some text, with their ends, and what is behind the last end, which may be empty."""
    *lines, rest = data.split(b"\n")
    return [*(line + b"\n" for line in lines), rest]

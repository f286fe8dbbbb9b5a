"""Commands in a guest over its virtio console: no agent, no network, any guest that has a `sh` on hvc0.

The host types `shell.sh` once; from then on it sends one line a command and gets each output after a line with its size and a
token that is random for each command, so that no answer can pass for another's.
"""

from __future__ import annotations

import os
import re
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import resources

from pytest_chvm.deadline import Deadline, poll_until, wait_readable
from pytest_chvm.errors import CommandTimeoutError, InvalidConfigError, VmError, VmIOError
from pytest_chvm.guest import renew
from pytest_chvm.model import CommandResult
from pytest_chvm.untouched import monotonic_s, random_hex

# An answer larger than this is not the guest's memory any more, but somebody's trick.
LARGEST_ANSWER = 256 << 20
CONNECT_TIMEOUT_S = 10.0
# Sent at once; what is left of a piece when a command is given up is sent as padding before the next one.
INPUT_PIECE = 1 << 18
# As in shell.sh: what may be on its way from the guest at once. QEMU's virtio console drops what does not fit into the socket.
OUTPUT_PIECE = 1 << 15
KILL_TIMEOUT_S = 5.0
LARGEST_STATUS = 255
# What comes in a line after its token, which is another one each time.
SHELL_OR_LOOP, LOOP, INPUT = re.compile(rb"(sh|loop)\r?"), re.compile(rb"loop\r?"), re.compile(rb"input")
WAITS, RENEW = re.compile(rb"waits"), re.compile(rb"renew")
OUT, ERR, END = re.compile(rb"out (\d{1,15})"), re.compile(rb"err (\d{1,15})"), re.compile(rb"end ([^\n]{0,40})")
LONGEST_WORDS = 50
NO_SHELL = (
    "no shell answers on the guest's virtio console (hvc0). The built-in guest has one; an image of your own needs a "
    "service that runs 'sh </dev/hvc0 >/dev/hvc0 2>&1'"
)


@dataclass
class _Answer:
    """What has come of a command's answer; `left` are the bytes to come of each output that has begun."""

    token: str
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    left: dict[bytes, int] = field(default_factory=dict)


@dataclass
class GuestShell:
    """The console of one guest. `open_console` returns a descriptor of it, readable and writable.

    `wake_fds` are watched while an answer is awaited; when one is readable, `check_alive` is called, which raises what
    has become of the guest; `console_closed` does so when the VMM has closed the console, as it does on its way out.
    """

    vm_name: str
    open_console: Callable[[], int]
    wake_fds: Callable[[], list[int]]
    check_alive: Callable[[], None]
    console_closed: Callable[[], None]

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._pending = bytearray()
        # An input that the guest has not acknowledged, and the bytes of it that were not sent: a command was given up meanwhile.
        self._input_token: str | None = None
        self._owed = 0
        self._unsent = 0
        # Whether the guest's side is known to be waiting for a command.
        self._in_step = False

    def run(self, command: str | Sequence[str], *, timeout: float, input: bytes | None) -> CommandResult:
        """Run a command in the guest and return what it did; one at a time, others wait for their turn.

        Raises CommandTimeoutError after `timeout` seconds, when the command and all it started are killed; VmIOError
        where no shell answers; what `check_alive` raises when the guest dies meanwhile.
        """
        script = _script(command)
        started = monotonic_s()
        deadline = Deadline.after(timeout)
        shown = command if isinstance(command, str) else tuple(os.fsdecode(word) for word in command)
        with self._lock:
            late = None
            try:
                self._connect(deadline)
                if input:
                    self._send_input(input, deadline)
                answer = _Answer(random_hex(16))
                try:
                    self._write(f"run {answer.token} ".encode() + _escaped(script) + b"\n", deadline)
                    status = self._read_answer(answer, deadline)
                except TimeoutError:
                    late = self._killed(shown, answer, timeout)
            except BaseException:
                # The connection is kept: what is still on its way to the guest would be lost with it, and miscounted.
                self._in_step = False
                raise
        if late is not None:
            raise late
        return CommandResult(shown, status, bytes(answer.stdout), bytes(answer.stderr), monotonic_s() - started)

    def tell(self, script: str, timeout: float) -> None:
        """Run a command without waiting for its end: one that ends the guest. Raises VmIOError where no shell answers in time."""
        deadline = Deadline.after(timeout)
        with self._lock:
            try:
                self._connect(deadline)
                self._write(f"run {random_hex(16)} ".encode() + _escaped(script.encode()) + b"\n", deadline)
            except TimeoutError as error:
                raise VmIOError(f"VM {self.vm_name!r}: {NO_SHELL}", vm_name=self.vm_name) from error
            finally:
                # The connection is kept: what is still on its way to the guest would be lost with it.
                self._in_step = False

    def do(self, script: str, timeout: float = CONNECT_TIMEOUT_S) -> None:
        """Have the guest's shell itself run one line of printable ASCII before its next command, without waiting for the end.

        Raises VmIOError where no shell answers in time.
        """
        deadline = Deadline.after(timeout)
        with self._lock:
            try:
                self._connect(deadline)
                self._write(f"do - {script}\n".encode("ascii"), deadline)
            except TimeoutError as error:
                self._in_step = False
                raise VmIOError(f"VM {self.vm_name!r}: {NO_SHELL}", vm_name=self.vm_name) from error

    @property
    def is_connected(self) -> bool:
        """Whether a shell has answered there."""
        return self._fd is not None and self._in_step

    def poke(self, script: str, timeout: float) -> bool | None:
        """Have the guest's loop run a line of printable ASCII, also while a command runs there and its answer is awaited.

        Returns False where no shell takes it, None where that cannot be told now.
        """
        line = f"do - {script}\n".encode("ascii")
        if not self._lock.acquire(blocking=False):
            if not self._in_step or self._unsent or self._fd is None:
                return None
            try:
                return os.write(self._fd, line) == len(line)
            except OSError:
                return False
        self._lock.release()
        try:
            self.do(script, timeout)
        except VmError:
            return False
        return True

    def renew(self, message: Callable[[], bytes], line: str, deadline: Deadline) -> None:
        """Have a clone renewed, whose shell was `waiting` when it was saved, and then run a line, as `do` does.

        `message` makes what the guest is told when it asks for it. Raises VmIOError where it does not ask in time.
        """
        token = random_hex(renew.TOKEN_SIZE // 2)
        with self._lock:
            try:
                self._open()
                self._write(renew.call(token), deadline)
                self._read_line(token, RENEW, deadline)
                self._write(message() + f"do - {line}\n".encode("ascii"), deadline)
                self._in_step = True
            except TimeoutError as error:
                self._in_step = False
                raise VmIOError(
                    f"VM {self.vm_name!r}: its shell did not begin to make it a machine of its own within {deadline.total_s:g} s",
                    vm_name=self.vm_name,
                ) from error

    @contextmanager
    def waiting(self, line: Callable[[str], str], timeout: float = CONNECT_TIMEOUT_S) -> Iterator[None]:
        """Have the guest's shell wait for its renewal, as a snapshot has to find it; afterwards it goes on.

        `line` makes the line, as for `do`, after which it waits, of the token that it says then. Raises VmIOError where it says
        nothing.
        """
        token = random_hex(16)
        deadline = Deadline.after(timeout)
        with self._lock:
            # In step anew, with the terminal's settings: what is still on its way to the guest is not saved with it.
            self._in_step = False
            try:
                self._connect(deadline)
                self._in_step = False
                try:
                    self._write(f"do - {line(token)}\n".encode("ascii"), deadline)
                    self._read_line(token, WAITS, deadline)
                    yield
                finally:
                    # Of one that ended meanwhile, which takes nothing any more, the next command says so.
                    if self._fd is not None:
                        with suppress(VmError, TimeoutError):
                            self._write(renew.AWAY, Deadline.after(timeout))
            except TimeoutError as error:
                if isinstance(error, VmError):
                    raise
                raise VmIOError(
                    f"VM {self.vm_name!r}: its shell did not begin to wait for a renewal within {timeout:g} s", vm_name=self.vm_name
                ) from error

    def close(self) -> None:
        """Let go of the console; the next command connects again."""
        self._pending.clear()
        self._in_step = False
        self._input_token = None
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _open(self) -> None:
        if self._fd is None:
            self._fd = self.open_console()
            os.set_blocking(self._fd, False)

    def _connect(self, deadline: Deadline) -> None:
        self._open()
        if self._in_step:
            return
        patience = Deadline.after(min(CONNECT_TIMEOUT_S, deadline.remaining_s))
        token = random_hex(16)
        # The quotes keep a terminal's echo of the line from looking like its answer; the loop ignores the first line.
        half = len(token) // 2
        hello = f"\nstty raw -echo 2>/dev/null\neval {token} 2>/dev/null; echo; echo '{token[:half]}''{token[half:]}' sh\n"
        try:
            self._finish_input(patience)
            self._write(b"\ndrop\n" + hello.encode(), patience)
            found = self._read_line(token, SHELL_OR_LOOP, patience)
            if found[1] == b"sh":
                # One line starts the loop, so that the shell has read nothing beyond it when the loop answers.
                self._write(shell_script() + f"chvm_loop {token}\n".encode(), patience)
                self._read_line(token, LOOP, patience)
            self._in_step = True
        except TimeoutError as error:
            if deadline.expired:
                raise CommandTimeoutError(
                    f"VM {self.vm_name!r}: {NO_SHELL}: nothing within {deadline.total_s:g} s", vm_name=self.vm_name
                ) from error
            raise VmIOError(
                f"VM {self.vm_name!r}: {NO_SHELL}: nothing within {patience.total_s:.0f} s", vm_name=self.vm_name
            ) from error

    def _send_input(self, data: bytes, deadline: Deadline) -> None:
        try:
            for start in range(0, len(data), INPUT_PIECE):
                piece = data[start : start + INPUT_PIECE]
                token = random_hex(16)
                self._write(f"input {token} {len(piece)}\n".encode(), deadline)
                self._input_token, self._owed = token, len(piece)
                try:
                    self._write(piece, deadline)
                finally:
                    self._owed = self._unsent
                self._finish_input(deadline)
        except TimeoutError as error:
            raise CommandTimeoutError(
                f"VM {self.vm_name!r}: the guest did not take {len(data)} bytes of input within {deadline.total_s:g} s",
                vm_name=self.vm_name,
            ) from error

    def _finish_input(self, deadline: Deadline) -> None:
        """Send what the guest still waits for and read that it has it: it may read ahead, so nothing else goes before that."""
        if self._input_token is None:
            return
        self._write(bytes(self._owed), deadline)
        self._owed = 0
        self._read_line(self._input_token, INPUT, deadline)
        self._input_token = None

    def _read_answer(self, answer: _Answer, deadline: Deadline) -> int:
        """Read what is left of an answer and return the exit status; after a TimeoutError it can be gone on with."""
        for name, size, output in ((b"out", OUT, answer.stdout), (b"err", ERR, answer.stderr)):
            if name not in answer.left:
                answer.left[name] = self._checked_size(int(self._read_line(answer.token, size, deadline)[1]))
            while left := answer.left[name]:
                piece = min(left, OUTPUT_PIECE)
                while len(self._pending) < piece:
                    self._fill(deadline)
                output += self._pending[:piece]
                del self._pending[:piece]
                answer.left[name] -= piece
                self._write(b"more\n", deadline)
        status = self._read_line(answer.token, END, deadline)[1]
        if not re.fullmatch(rb"\d{1,3}", status) or int(status) > LARGEST_STATUS:
            raise VmIOError(f"VM {self.vm_name!r}: the guest's shell gave {status!r} as an exit status", vm_name=self.vm_name)
        return int(status)

    def _checked_size(self, size: int) -> int:
        if size > LARGEST_ANSWER:
            raise VmIOError(
                f"VM {self.vm_name!r}: a command printed {size >> 20} MiB, more than {LARGEST_ANSWER >> 20} MiB; "
                "write large results to a file in a shared dir",
                vm_name=self.vm_name,
            )
        return size

    def _killed(self, command: str | tuple[str, ...], answer: _Answer, timeout: float) -> CommandTimeoutError:
        patience = Deadline.after(KILL_TIMEOUT_S)
        try:
            self._write(b"kill\n", patience)
            self._read_answer(answer, patience)
            after = "it was killed"
        except TimeoutError:
            self._in_step = False
            after = "it was killed, and not all of its output came in time"
            if not answer.left:
                after = "the guest did not answer the order to kill it either"
        out, err = (bytes(part).decode(errors="surrogateescape") for part in (answer.stdout, answer.stderr))
        return CommandTimeoutError(
            f"VM {self.vm_name!r}: the command {command!r} did not end within {timeout:g} s; {after}.\n" + shown_outputs(out, err),
            vm_name=self.vm_name,
            stdout=out,
            stderr=err,
        )

    def _read_line(self, token: str, words: re.Pattern[bytes], deadline: Deadline) -> re.Match[bytes]:
        """Drop what comes before the line `TOKEN WORDS`, and it; returns the match of its words."""
        mark = f"\n{token} ".encode()
        while True:
            start = self._pending.find(mark)
            while start >= 0:
                first = start + len(mark)
                end = self._pending.find(b"\n", first, first + LONGEST_WORDS)
                # Of a copy: a match of the buffer itself would change with it.
                if end >= 0 and (match := words.fullmatch(bytes(self._pending[first:end]))):
                    del self._pending[: end + 1]
                    return match
                start = self._pending.find(mark, start + 1)
            del self._pending[: -len(mark) - LONGEST_WORDS]
            self._fill(deadline)

    def _fill(self, deadline: Deadline) -> None:
        assert self._fd is not None
        ready = self._wait(self._fd, deadline)
        if not ready:
            raise TimeoutError
        try:
            data = os.read(self._fd, 1 << 18)
        except BlockingIOError:
            return
        except OSError as error:
            data = b""
            self._gone(error)
        if not data:
            self._gone(None)
        self._pending += data

    def _gone(self, error: OSError | None) -> None:
        self.close()
        self.console_closed()
        raise VmIOError(
            f"VM {self.vm_name!r}: the VMM closed the guest's console{f' ({error.strerror})' if error else ''}",
            vm_name=self.vm_name,
        )

    def _wait(self, fd: int, deadline: Deadline) -> bool:
        while True:
            ready = wait_readable([fd, *self.wake_fds()], deadline)
            if fd in ready:
                return True
            if ready:
                self.check_alive()
            elif deadline.expired:
                return False

    def _write(self, data: bytes, deadline: Deadline) -> None:
        import select

        assert self._fd is not None
        view = memoryview(data)
        self._unsent = len(view)
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        for wake in self.wake_fds():
            poll.register(wake, select.POLLIN)
        while view:
            events = dict(poll_until(poll, deadline))
            if self._fd in events:
                try:
                    view = view[os.write(self._fd, view) :]
                    self._unsent = len(view)
                except BlockingIOError:
                    continue
                except OSError as error:
                    self._gone(error)
            elif events:
                self.check_alive()
            elif deadline.expired:
                raise TimeoutError


def shell_script() -> bytes:
    """Return what is typed into the guest's shell, to have it serve commands."""
    return resources.files("pytest_chvm.guest").joinpath("shell.sh").read_bytes()


def _script(command: str | Sequence[str]) -> bytes:
    if isinstance(command, str):
        script = os.fsencode(command)
    elif isinstance(command, Sequence) and command and not isinstance(command, bytes):
        script = b"exec " + os.fsencode(shlex.join(os.fsdecode(word) for word in command))
    else:
        raise InvalidConfigError(f"command {command!r}: expected a string for sh, or a list of one program's arguments")
    if b"\0" in script:
        raise InvalidConfigError("a command cannot have a NUL")
    return script


def _escaped(script: bytes) -> bytes:
    # printf's %b takes \0NNN; all that a line-wise read or the terminal could take amiss goes that way, spaces at both ends too.
    printable = b"".join(bytes([byte]) if 0x20 <= byte < 0x7F and byte != 0x5C else b"\\0%03o" % byte for byte in script)
    return re.sub(rb"^ | \Z", rb"\\0040", printable)


def shown_outputs(stdout: str, stderr: str, limit: int = 4000) -> str:
    """Return both outputs of a command for a message, the last `limit` characters of each, cleaned."""
    from pytest_chvm.text import clean

    parts = []
    for name, text in (("stdout", stdout), ("stderr", stderr)):
        cleaned = clean(text.encode(errors="surrogateescape"))
        cut = f"... (the last {limit} of {len(cleaned)} characters)\n" if len(cleaned) > limit else ""
        parts.append(f"{name}: {cut}{cleaned[-limit:] or '(nothing)'}")
    return "\n".join(parts)

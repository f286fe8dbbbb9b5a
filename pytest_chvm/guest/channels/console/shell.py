"""Commands in a guest over its virtio console: no agent, no network, any guest that has a `sh` on hvc0.

The host types `shell.sh` once; from then on it sends one line a command, with a token that is random for each. What commands
print comes back in pieces, each after a line with its command's token and what is left of that output, and is acknowledged with
`more`; those of several commands take turns. A line `TOKEN end STATUS` is a command's last.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import resources

from pytest_chvm.base.deadline import Deadline, checked_timeout
from pytest_chvm.base.text import shown_outputs
from pytest_chvm.base.untouched import monotonic_s, random_hex
from pytest_chvm.errors import CommandTimeoutError, UnsupportedError, VmError, VmIOError
from pytest_chvm.guest import commands, renew
from pytest_chvm.guest.channels.console.console import MORE, Answer, Message, Stream
from pytest_chvm.guest.channels.console.streams import ConsoleProcess, StreamConsole
from pytest_chvm.guest.commands import script_of
from pytest_chvm.model import CommandResult

# Sent at once; others' commands wait while the guest reads it.
INPUT_PIECE = 1 << 18
KILL_TIMEOUT_S = 5.0
START_TIMEOUT_S = 60.0
# Longer ones go as a file: Linux takes no argument of 128 KiB (MAX_ARG_STRLEN, execve(2)).
LONGEST_LINE_COMMAND = 1 << 16
# An input that is a line of so many characters goes as one, which spares an emulated guest two processes.
LONGEST_LINE_INPUT = 512
# What comes in a line after its token, which is another one each time.
SHELL_OR_LOOP, LOOP = re.compile(rb"sh|loop"), re.compile(rb"loop")
WAITS, RENEW = re.compile(rb"waits"), re.compile(rb"renew")
NO_SHELL = (
    "no shell answers on the guest's virtio console (hvc0). The built-in guest has one; an image of your own needs a "
    "service that runs 'sh </dev/hvc0 >/dev/hvc0 2>&1'"
)


class GuestShell(StreamConsole):
    """The shell on a guest's console, which runs the commands of any number of threads at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Whether the guest's side is known to be waiting for a command.
        self._in_step = False
        # While the guest is saved, and while somebody connects, nobody else talks to it.
        self._alone = False

    def run(self, command: str | Sequence[str], *, timeout: float | None, input: bytes | None) -> CommandResult:
        """Run a command in the guest and return what it did; commands of several threads run at once.

        `timeout` is seconds; None, 0 and infinity are no limit. Raises CommandTimeoutError after it, when the command and all it
        started are killed; VmIOError where no shell answers; what `check_alive` raises when the guest dies meanwhile.
        """
        script = os.fsencode(script_of(command))
        deadline = Deadline.after(checked_timeout(timeout) or None)
        started = monotonic_s()
        shown = commands.shown(command)
        answer = Answer()
        late = None
        with self._changed:
            self._begin(deadline, shown)
            self._answers[answer.token.encode()] = answer
            try:
                try:
                    self._start(answer, script, input, deadline)
                    self._hear(answer, lambda: answer.status is not None, deadline)
                except TimeoutError as error:
                    if isinstance(error, VmError):
                        raise
                    late = self._killed(shown, answer, deadline.total_s)
            except BaseException:
                self._give_up(answer)
                raise
        if late is not None:
            raise late
        assert answer.status is not None
        return CommandResult(shown, answer.status, bytes(answer.stdout), bytes(answer.stderr), monotonic_s() - started)

    def popen(self, command: str | Sequence[str], *, input: bytes | None) -> ConsoleProcess:
        """Start a process in the guest that runs beside the test; see `StartingChannel.popen`."""
        script = os.fsencode(script_of(command))
        deadline = Deadline.after(START_TIMEOUT_S)
        shown = commands.shown(command)
        stream = Stream()
        with self._changed:
            self._begin(deadline, shown)
            self._answers[stream.token.encode()] = stream
            try:
                self._start(stream, script, input, deadline, "open")
                self._hear(stream, lambda: b"begun" in stream.words, deadline)
            except BaseException as error:
                self._give_up(stream)
                if isinstance(error, TimeoutError) and not isinstance(error, VmError):
                    raise CommandTimeoutError(
                        f"VM {self.vm_name!r}: the process {shown!r} was not started within {START_TIMEOUT_S:g} s",
                        vm_name=self.vm_name,
                    ) from error
                raise
        return ConsoleProcess(self, stream)

    def tell(self, script: str, timeout: float | None) -> None:
        """Run a command without waiting for its end: one that ends the guest. Raises VmIOError where no shell answers in time."""
        answer = Answer(kept=False)
        self._say(lambda: self._send(f"run {answer.token} ".encode() + _escaped(script.encode()) + b"\n"), timeout, answer)

    def do(self, script: str, timeout: float | None = None) -> None:
        """Have the guest's shell itself run one line of printable ASCII before its next command, without waiting for the end.

        `timeout` is in seconds (None: the line's `connect_timeout_s`). Raises VmIOError where no shell answers in time.
        """
        self._say(lambda: self._send(f"do - {script}\n".encode("ascii")), timeout or self.line.connect_timeout_s)

    def _say(self, send: Callable[[], Message], timeout: float | None, answer: Answer | None = None) -> None:
        deadline = Deadline.after(timeout)
        with self._changed:
            try:
                self._begin(deadline)
                if answer:
                    self._answers[answer.token.encode()] = answer
                    # Whether it still listens afterwards is to be seen.
                    self._in_step = False
                message = send()
                self._wait(lambda: message.sent, deadline)
            except TimeoutError as error:
                self._in_step = False
                raise VmIOError(f"VM {self.vm_name!r}: {NO_SHELL}", vm_name=self.vm_name) from error

    @property
    def is_connected(self) -> bool:
        """Whether a shell has answered there."""
        return self._fd is not None and self._in_step

    def poke(self, script: str, timeout: float) -> bool | None:
        """Have the guest's loop run a line of printable ASCII, also while answers are awaited; for who is asked by those that wait.

        Returns False where no shell takes it, None where that cannot be told now.
        """
        with self._changed:
            # While bytes are moved this is called by who moves them, and must not wait for itself.
            if self._moving or self._alone:
                if not self._in_step or self._awaited or self._outbox or self._fd is None:
                    return None
                line = self._send(f"do - {script}\n".encode("ascii"))
                try:
                    self._flush()
                except OSError:
                    return False
                return True if line.sent else None
        try:
            self.do(script, timeout)
        except VmError:
            return False
        return True

    def renew(self, message: Callable[[], bytes], line: str, deadline: Deadline) -> None:
        """Have a clone renewed, whose shell was `waiting` when it was saved, and then run a line, as `do` does.

        `message` makes what the guest is told when it asks for it. Raises VmIOError where it does not ask in time.
        """
        asked = Answer(RENEW, random_hex(renew.TOKEN_SIZE // 2))
        with self._changed:
            try:
                self._open()
                self._send(renew.call(asked.token))
                self._expect(asked, deadline)
                told = self._send(message() + f"do - {line}\n".encode("ascii"))
                self._wait(lambda: told.sent, deadline)
                self._in_step = True
            except TimeoutError as error:
                self._in_step = False
                raise VmIOError(
                    f"VM {self.vm_name!r}: its shell did not begin to make it a machine of its own within {deadline.total_s:g} s",
                    vm_name=self.vm_name,
                ) from error

    @contextmanager
    def waiting(self, line: Callable[[str], str], timeout: float | None = None) -> Iterator[None]:
        """Have the guest's shell wait for its renewal, as a snapshot has to find it; afterwards it goes on.

        `line` makes the line, as for `do`, after which it waits, of the token that it says then. Commands of other threads are
        waited for before, and wait meanwhile. `timeout` is in seconds (None: the line's `connect_timeout_s`). Raises VmIOError
        where they do not end, or the shell says nothing, in time.
        """
        said = Answer(WAITS)
        timeout = timeout or self.line.connect_timeout_s
        deadline = Deadline.after(timeout)
        try:
            with self._changed:
                if any(isinstance(answer, Stream) and answer.kept for answer in self._answers.values()):
                    raise UnsupportedError(
                        f"VM {self.vm_name!r} cannot be saved while a process that popen() has started runs in it, which its "
                        "clones would lack: kill() it before, or start it in the background with run()",
                        vm_name=self.vm_name,
                    )
                self._wait(lambda: not self._alone and not self._busy, deadline)
                self._alone = True
            try:
                with self._changed:
                    # In step anew, with the terminal's settings: what is still on its way to the guest is not saved with it.
                    self._in_step = False
                    self._connect(deadline)
                    self._in_step = False
                    self._send(f"do - {line(said.token)}\n".encode("ascii"))
                try:
                    with self._changed:
                        self._expect(said, deadline)
                    yield
                finally:
                    self._send_away(timeout)
            finally:
                with self._changed:
                    self._alone = False
                    self._changed.notify_all()
        except TimeoutError as error:
            if isinstance(error, VmError):
                raise
            busy = "; a command of another thread still runs" if self._busy else ""
            raise VmIOError(
                f"VM {self.vm_name!r}: its shell did not begin to wait for a renewal within {timeout:g} s{busy}",
                vm_name=self.vm_name,
            ) from error

    def _send_away(self, timeout: float) -> None:
        # Of one that ended meanwhile, which takes nothing any more, the next command says so.
        with self._changed, suppress(VmError, TimeoutError):
            if self._fd is not None:
                away = self._send(renew.AWAY)
                self._wait(lambda: away.sent, Deadline.after(timeout))

    def close(self) -> None:
        """Let go of the console; the next command connects again."""
        self._in_step = False
        super().close()

    @property
    def _busy(self) -> bool:
        """Whether there is a command that somebody waits for."""
        return any(answer.kept for answer in self._answers.values())

    def _expect(self, answer: Answer, deadline: Deadline) -> bytes:
        """Block until the line of a token has come; returns its words."""
        self._answers[answer.token.encode()] = answer
        try:
            self._hear(answer, lambda: bool(answer.words), deadline)
        finally:
            self._answers.pop(answer.token.encode(), None)
        return answer.words[0]

    def _begin(self, deadline: Deadline, command: object = None) -> None:
        """Wait until the guest may be talked to, and connect to it where that is to be done."""
        try:
            self._wait(lambda: not self._alone, deadline)
        except TimeoutError as error:
            raise CommandTimeoutError(
                f"VM {self.vm_name!r}: the command {command!r} was not started within {deadline.total_s:g} s: another thread saves "
                "the VM, or connects to its shell",
                vm_name=self.vm_name,
            ) from error
        self._alone = True
        try:
            self._connect(deadline)
        finally:
            self._alone = False
            self._changed.notify_all()

    def _connect(self, deadline: Deadline) -> None:
        self._open()
        if self._in_step:
            return
        patience = Deadline.after(min(self.line.connect_timeout_s, deadline.remaining_s))
        said = Answer(SHELL_OR_LOOP)
        # The quotes keep a terminal's echo of the line from looking like its answer; the loop ignores the first line.
        half = len(said.token) // 2
        one, two = said.token[:half], said.token[half:]
        hello = f"\nstty raw -echo 2>/dev/null\neval {said.token} 2>/dev/null; echo; echo '{one}''{two}' sh\n"
        # Where nobody waits for an answer, what was given up ends, and whatever comes of it is none.
        drop = b"" if self._busy else b"\ndrop\n"
        if drop:
            self._forget_answers()
        try:
            self._send(drop + hello.encode())
            if self._expect(said, patience) == b"sh":
                # One line starts the loop, so that the shell has read nothing beyond it when the loop answers.
                loop = Answer(LOOP)
                self._send(shell_script(self.line.console_piece) + f"chvm_loop {loop.token}\n".encode())
                self._lose_all()
                self._expect(loop, patience)
            self._in_step = True
        except TimeoutError as error:
            kind = CommandTimeoutError if deadline.expired else VmIOError
            raise kind(
                f"VM {self.vm_name!r}: {NO_SHELL}: nothing within {min(deadline.total_s, patience.total_s):g} s",
                vm_name=self.vm_name,
            ) from error

    def _lose_all(self) -> None:
        for answer in self._answers.values():
            answer.error = answer.error or f"VM {self.vm_name!r}: the shell that ran the command in the guest was killed meanwhile"
        self._answers.clear()
        self._piece = None
        self._changed.notify_all()

    def _start(self, answer: Answer, script: bytes, input: bytes | None, deadline: Deadline, how: str = "run") -> None:
        long = len(script) > LONGEST_LINE_COMMAND
        text = _line_input(input)
        try:
            for kind, data in (("script", script if long else b""), ("input", b"" if text else input or b"")):
                self._send_file(answer, kind, data, deadline)
        except TimeoutError as error:
            raise CommandTimeoutError(
                f"VM {self.vm_name!r}: the guest did not take {len(script) * long + len(input or b'')} bytes of input within "
                f"{deadline.total_s:g} s",
                vm_name=self.vm_name,
            ) from error
        first = f"text {answer.token} ".encode() + text + b"\n" if text else b""
        line = self._send(first + f"{how} {answer.token} ".encode() + (b"" if long else _escaped(script)) + b"\n")
        try:
            self._hear(answer, lambda: line.sent, deadline)
        except BaseException as error:
            if self._take_back(line) and isinstance(error, TimeoutError):
                raise CommandTimeoutError(
                    f"VM {self.vm_name!r}: the guest took no command within {deadline.total_s:g} s: it was not started",
                    vm_name=self.vm_name,
                ) from error
            raise

    def _send_file(self, answer: Answer, kind: str, data: bytes, deadline: Deadline) -> None:
        """Have the guest write a file for a command, piece by piece, each once it has the one before.

        No output may come meanwhile, since it could not be acknowledged: the guest may read ahead.
        """
        for start in range(0, len(data), INPUT_PIECE):
            piece = data[start : start + INPUT_PIECE]
            request, message = self._send(f"turn {answer.token}\n".encode()), None
            try:
                self._hear(answer, lambda: b"turn" in answer.words, deadline)
                message = self._send(f"{kind} {answer.token} {len(piece)}\n".encode() + piece, answer)
                self._hear(answer, lambda: b"input" in answer.words, deadline)
            except BaseException:
                if (message is None or self._take_back(message)) and b"turn" in answer.words:
                    self._send(MORE)
                self._take_back(request)
                raise
            answer.words.clear()

    def _give_up(self, answer: Answer) -> None:
        """Wait no longer for an answer: its command is killed when the guest next listens."""
        answer.kept = False
        if answer.status is None and self._fd is not None:
            self._in_step = False
            self._send(f"kill {answer.token}\n".encode())

    def _killed(self, command: str | tuple[str, ...], answer: Answer, timeout: float) -> CommandTimeoutError:
        patience = Deadline.after(KILL_TIMEOUT_S)
        self._send(f"kill {answer.token}\n".encode())
        try:
            self._hear(answer, lambda: answer.status is not None, patience)
            after = "it was killed"
        except TimeoutError:
            answer.kept = self._in_step = False
            after = "it was killed, and not all of its output came in time"
            if not answer.words:
                after = "the guest did not answer the order to kill it either"
        out, err = (bytes(part).decode(errors="surrogateescape") for part in (answer.stdout, answer.stderr))
        return CommandTimeoutError(
            f"VM {self.vm_name!r}: the command {command!r} did not end within {timeout:g} s; {after}.\n" + shown_outputs(out, err),
            vm_name=self.vm_name,
            stdout=out,
            stderr=err,
        )


def shell_script(output_piece: int) -> bytes:
    """Return what is typed into the guest's shell, to have it serve commands and send outputs in pieces of so many bytes."""
    return (
        f"chvm_piece={output_piece}\n".encode()
        + resources.files("pytest_chvm.guest.channels.console").joinpath("shell.sh").read_bytes()
    )


def _line_input(data: bytes | None) -> bytes | None:
    """Return a short input as the guest's printf is told it; None for one that goes as a file."""
    # Not every printf writes a NUL.
    if not data or len(data) > LONGEST_LINE_INPUT or b"\0" in data:
        return None
    line = _escaped(data)
    return line if len(line) <= LONGEST_LINE_INPUT else None


def _escaped(script: bytes) -> bytes:
    # printf's %b takes \0NNN; all that a line-wise read or the terminal could take amiss goes that way, spaces at both ends too.
    printable = b"".join(bytes([byte]) if 0x20 <= byte < 0x7F and byte != 0x5C else b"\\0%03o" % byte for byte in script)
    return re.sub(rb"^ | \Z", rb"\\0040", printable)

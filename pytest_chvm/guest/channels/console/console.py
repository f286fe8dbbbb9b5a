"""One byte stream to a guest, its virtio console, shared by all who talk to it at once.

Whoever waits for something and finds nobody at it moves the bytes for all: what is to be sent, whole messages one after the
other, and what comes, to those whose token it bears. A token is random for each command, so that no answer can pass for another's.
"""

from __future__ import annotations

import os
import re
import select
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from pytest_chvm.base.deadline import Deadline, poll_until
from pytest_chvm.base.untouched import random_hex
from pytest_chvm.errors import VmIOError
from pytest_chvm.guest.channels import Line

# An answer larger than this is not the guest's memory any more, but somebody's trick.
LARGEST_ANSWER = 256 << 20
# Of a process that runs beside the test, so much of an output is kept that nobody has read; then the process has to wait.
LARGEST_UNREAD = 8 << 20
READ_SIZE = 1 << 18
LINE = re.compile(rb"\n([0-9a-f]{32}) ([^\n]{0,50})\n")
LONGEST_LINE = 1 + 32 + 1 + 50 + 1
ANSWER = re.compile(rb"(out|err) (\d{1,15})|end ([^\n]{0,40})|turn|input|begun")
LARGEST_STATUS = 255
# Gives back the turn to write to the console.
MORE = b"more\n"


@dataclass(eq=False)
class Answer:
    """What has come with one token: the lines `expects` stands for, and for a command its outputs and at last its `status`.

    `kept` is False for what nobody waits for any more: it is read, so that others' answers come, and thrown away.
    """

    expects: re.Pattern[bytes] = ANSWER
    token: str = field(default_factory=lambda: random_hex(16))
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    words: list[bytes] = field(default_factory=list)
    status: int | None = None
    error: str | None = None
    kept: bool = True

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come with its token."""
        return self.status is not None

    def output(self, name: bytes) -> bytearray:
        """Return what has come of an output, b"out" or b"err"."""
        return self.stdout if name == b"out" else self.stderr

    def ends_output(self, _name: bytes) -> None:
        """Take note that nothing more comes of an output."""

    def asks_for_more(self, _name: bytes) -> bytes:
        """Return what is to be sent, beside the turn, once a piece of an output has come."""
        return b""


@dataclass(eq=False)
class Stream(Answer):
    """What comes of a process while it runs. Its outputs are taken away as they come, and each is over after an empty piece.

    The guest sends no further piece of an output before it was asked for it: it is not while much of it waits to be taken away.
    """

    still_open: set[bytes] = field(default_factory=lambda: {b"out", b"err"})
    # Those of which the guest waits to be asked for more.
    held: set[bytes] = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        """Whether the process has ended and both of its outputs have."""
        return self.status is not None and not self.still_open

    def ends_output(self, name: bytes) -> None:
        """Take note that nothing more comes of an output."""
        self.still_open.discard(name)

    def asks_for_more(self, name: bytes) -> bytes:
        """Return the line that asks for another piece, unless enough of that output waits here."""
        if self.kept and len(self.output(name)) >= LARGEST_UNREAD:
            self.held.add(name)
            return b""
        self.held.discard(name)
        return b"go %s %s\n" % (self.token.encode(), name)


@dataclass(eq=False)
class Message:
    """What is to be sent as a whole. Nothing is sent after it before `awaited` is heard: the guest may read ahead of it."""

    left: memoryview
    awaited: Answer | None = None
    begun: bool = False

    @property
    def sent(self) -> bool:
        """Whether all of it is on its way."""
        return not self.left


@dataclass(eq=False)
class Console:
    """The console of one guest, at the end of a line; its outputs come in pieces of `line.console_piece` bytes at most."""

    line: Line

    @property
    def vm_name(self) -> str:
        """The name of the VM."""
        return self.line.vm_name

    def __post_init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._moving = False
        # Another number for each; who waits on one that has ended would wait for ever.
        self._connection = 0
        self._fd: int | None = None
        # Wakes the one who moves the bytes: there is more to send, or the console is to be closed.
        self._wake: int | None = None
        self._outbox: deque[Message] = deque()
        self._awaited: Answer | None = None
        self._answers: dict[bytes, Answer] = {}
        self._pending = bytearray()
        # Of the piece that comes now: whose it is, the output that it is of, and the bytes left.
        self._piece: tuple[Answer, bytes, int] | None = None
        # A command has changed the terminal's settings: each line's end comes as two bytes, until the loop has set them right.
        self._cooked = False

    def close(self) -> None:
        """Let go of the console; those who wait for an answer are told, and the next command connects again."""
        with self._changed:
            self._connection += 1
            while self._moving:
                self._nudge()
                self._changed.wait()
            self._let_go()

    def _let_go(self) -> None:
        self._connection += 1
        self._answers.clear()
        self._outbox.clear()
        self._awaited = self._piece = None
        self._pending.clear()
        fds, self._fd, self._wake = (self._fd, self._wake), None, None
        for fd in fds:
            if fd is not None:
                os.close(fd)
        self._changed.notify_all()

    def _open(self) -> None:
        if self._fd is None:
            self._fd = self.line.open_console()
            os.set_blocking(self._fd, False)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def _nudge(self) -> None:
        if self._wake is not None:
            os.eventfd_write(self._wake, 1)

    def _send(self, data: bytes, awaited: Answer | None = None) -> Message:
        """Queue a message; it goes when somebody waits."""
        message = Message(memoryview(data), awaited)
        self._outbox.append(message)
        if self._moving:
            self._nudge()
        return message

    def _forget_answers(self) -> None:
        """Take nothing that comes for an answer any more, but that what is sent was read, which the next message waits for."""
        owed = {self._awaited, *(message.awaited for message in self._outbox)}
        self._answers = {token: answer for token, answer in self._answers.items() if answer in owed}
        self._piece = None

    def _take_back(self, message: Message) -> bool:
        """Have a message not sent at all; tells whether that was still possible."""
        if message.begun or message not in self._outbox:
            return False
        self._outbox.remove(message)
        return True

    def _wait(self, done: Callable[[], bool], deadline: Deadline) -> None:
        """Block until `done`, with the lock held, and move the bytes meanwhile. Raises TimeoutError at the deadline."""
        connection = self._connection
        while not done():
            if connection != self._connection:
                raise VmIOError(
                    f"VM {self.vm_name!r}: its console was closed meanwhile: the VM was ended or rebooted", vm_name=self.vm_name
                )
            if deadline.expired:
                raise TimeoutError
            if self._moving:
                self._changed.wait(deadline.wait_s)
                continue
            self._moving = True
            try:
                self._move(deadline)
            finally:
                self._moving = False
                self._changed.notify_all()

    def _hear(self, answer: Answer, done: Callable[[], bool], deadline: Deadline) -> None:
        """As `_wait`, for something of an answer's; raises VmIOError for one that cannot be or that will not come."""
        self._wait(lambda: answer.error is not None or done(), deadline)
        if answer.error is not None:
            raise VmIOError(answer.error, vm_name=self.vm_name)

    def _move(self, deadline: Deadline) -> bool:
        """Move bytes that can be moved by the deadline; tells whether there were any."""
        to_send = bool(self._outbox) and self._awaited is None
        self._changed.release()
        try:
            ready = self._poll(to_send, deadline)
        finally:
            self._changed.acquire()
        try:
            if ready & ~select.POLLOUT:
                self._fill()
                self._sort()
            if ready:
                self._flush()
        except OSError as error:
            if isinstance(error, VmIOError):
                raise
            self._gone(error)
        return bool(ready)

    def _poll(self, to_send: bool, deadline: Deadline) -> int:
        """Wait until bytes can be moved, or there may be others to move; returns the events of the console."""
        assert self._fd is not None
        assert self._wake is not None
        poll = select.poll()
        poll.register(self._fd, select.POLLIN | (select.POLLOUT if to_send else 0))
        poll.register(self._wake, select.POLLIN)
        for wake in self.line.wake_fds():
            poll.register(wake, select.POLLIN)
        # In pieces: another thread may have taken note of what would wake this one.
        events = dict(poll_until(poll, Deadline.after(deadline.wait_s)))
        nudged = events.pop(self._wake, 0)
        if nudged:
            with suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        ready = events.pop(self._fd, 0)
        if not ready and (events or not nudged):
            self.line.check_alive()
        return ready

    def _fill(self) -> None:
        assert self._fd is not None
        try:
            data = os.read(self._fd, READ_SIZE)
        except BlockingIOError:
            return
        if not data:
            self._gone(None)
        self._pending += data

    def _gone(self, error: OSError | None) -> None:
        self._let_go()
        self._changed.release()
        try:
            self.line.check_ending()
        finally:
            self._changed.acquire()
        raise VmIOError(
            f"VM {self.vm_name!r}: the VMM closed the guest's console{f' ({error.strerror})' if error else ''}",
            vm_name=self.vm_name,
        )

    def _flush(self) -> None:
        while self._outbox and self._awaited is None:
            assert self._fd is not None
            message = self._outbox[0]
            message.begun = True
            try:
                message.left = message.left[os.write(self._fd, message.left) :]
            except BlockingIOError:
                return
            if message.sent:
                self._outbox.popleft()
                self._awaited = message.awaited

    def _sort(self) -> None:
        """Give what has come to those whose it is."""
        while self._take_piece() or self._take_line():
            pass

    def _take_piece(self) -> bool:
        if self._piece is None:
            return False
        answer, name, left = self._piece
        if self._cooked:
            whole = len(self._pending) - self._pending.endswith(b"\r")
            part = self._pending[:whole].replace(b"\r\n", b"\n")[:left]
            del self._pending[: len(part) + part.count(b"\n")]
        else:
            part = self._pending[:left]
            del self._pending[: len(part)]
        if answer.kept:
            answer.output(name).extend(part)
        self._piece = (answer, name, left - len(part))
        if left > len(part):
            return False
        self._piece = None
        # Not before, since it may be echoed into the piece.
        asked = (b"stty\n" if self._cooked else b"") + MORE + answer.asks_for_more(name)
        self._outbox.append(Message(memoryview(asked)))
        return True

    def _take_line(self) -> bool:
        """Take the next line that is one of those expected, and drop what is before it."""
        if self._piece is not None:
            return False
        start = 0
        while found := LINE.search(self._pending, start):
            token, words, first, end = bytes(found[1]), bytes(found[2]).removesuffix(b"\r"), found.start(), found.end()
            cooked = found[2].endswith(b"\r")
            # A buffer cannot be cut while there is a match of it.
            del found
            answer = self._answers.get(token)
            if answer is not None and (match := answer.expects.fullmatch(words)):
                del self._pending[:end]
                self._cooked = cooked and answer.expects is ANSWER
                self._take(answer, words, match)
                return True
            start = first + 1
        del self._pending[: -(LONGEST_LINE - 1)]
        return False

    def _take(self, answer: Answer, words: bytes, match: re.Match[bytes]) -> None:
        # Of the lines before pieces one is enough, to see that the guest has answered.
        if not answer.words or not words.startswith((b"out ", b"err ")):
            answer.words.append(words)
        if answer is self._awaited:
            self._awaited = None
        if words == b"turn" and not answer.kept:
            self._outbox.append(Message(memoryview(MORE)))
        if answer.expects is not ANSWER or words in (b"turn", b"input", b"begun"):
            return
        if match[1]:
            self._take_output(answer, match[1], int(match[2]))
            return
        if self._cooked:
            self._outbox.append(Message(memoryview(b"stty\n")))
        if re.fullmatch(rb"\d{1,3}", match[3]) and int(match[3]) <= LARGEST_STATUS:
            answer.status = int(match[3])
        else:
            answer.error = answer.error or f"VM {self.vm_name!r}: the guest's shell gave {match[3]!r} as an exit status"
            self._answers.pop(answer.token.encode(), None)
        self._forget_if_over(answer)

    def _take_output(self, answer: Answer, name: bytes, size: int) -> None:
        """Take the line before a piece of an output, of which so many bytes are left."""
        whole = len(answer.output(name)) + size
        if whole > LARGEST_ANSWER:
            answer.error = answer.error or (
                f"VM {self.vm_name!r}: a command printed {whole >> 20} MiB, more than {LARGEST_ANSWER >> 20} MiB; "
                "write large results to a file in a shared dir, or to one that vm.get() fetches"
            )
            answer.kept = False
        if size:
            self._piece = (answer, name, min(size, self.line.console_piece))
        else:
            answer.ends_output(name)
            self._forget_if_over(answer)

    def _forget_if_over(self, answer: Answer) -> None:
        if answer.is_over:
            self._answers.pop(answer.token.encode(), None)

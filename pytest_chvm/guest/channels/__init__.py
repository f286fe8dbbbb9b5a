"""Channels: what runs commands in a guest, and so moves files too. One file or folder a kind, which has `open_channel(line)`.

Nothing is imported of a kind before a VM has one: a new one is its file here, and a kind of guest that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast, runtime_checkable

from pytest_chvm.base.deadline import Deadline
from pytest_chvm.model import CommandResult


@dataclass(frozen=True, slots=True)
class Line:
    """What a channel has of its VM.

    `open_console` returns a descriptor of the guest's virtio console, readable and writable. `wake_fds` are to be watched while an
    answer is awaited; when one is readable, and twice a second, `check_alive` is to be called, which raises what has become of the
    guest; `check_ending` does so when the VMM hangs up, as it does on its way out. `console_piece` is how many bytes of outputs may
    be on their way from the console at once. After `connect_timeout_s` seconds without an answer to the first line nobody listens.
    """

    vm_name: str
    open_console: Callable[[], int]
    wake_fds: Callable[[], list[int]]
    check_alive: Callable[[], None]
    check_ending: Callable[[], None]
    console_piece: int
    connect_timeout_s: float = 10.0


class Channel(Protocol):
    """Runs commands in one guest, those of any number of threads at once; it connects with the first one."""

    def run(self, command: str | Sequence[str], *, timeout: float | None, input: bytes | None) -> CommandResult:
        """Run a command and return what it did: a `str` goes to the guest's `sh`, a sequence is one program's arguments.

        `timeout` is seconds; None, 0 and infinity are no limit. Raises CommandTimeoutError after it, when the command and all it
        started are killed; VmIOError where nothing answers; what `Line.check_alive` raises when the guest dies meanwhile.
        """

    def tell(self, script: str, timeout: float | None) -> None:
        """Run a command without waiting for its end: one that ends the guest. Raises VmIOError where nothing takes it in time."""

    def poke(self, script: str, timeout: float) -> bool | None:
        """Have the guest run a line of printable ASCII, also while commands run, without waiting for its end.

        Called by who waits for an answer, to see whether the guest lives. Returns False where nothing takes it, None where that
        cannot be told now.
        """

    @property
    def is_connected(self) -> bool:
        """Whether the guest has answered on it."""

    def close(self) -> None:
        """Let go of the guest; the next command connects again."""


class Process(Protocol):
    """A process of the guest's that runs beside the test, as the channel that started it has it. Any thread may use it."""

    @property
    def returncode(self) -> int | None:
        """What the guest's shell has said of its end, 128 + N for one that signal N ended; None before that."""

    @property
    def is_lost(self) -> bool:
        """Whether the channel was closed before all of it had come: nothing more will."""

    def read(self, name: str, deadline: Deadline) -> bytes:
        """Block until something of an output, "out" or "err", has come, and take it; empty at its end, and where it is lost.

        Raises TimeoutError at the deadline; VmIOError where the channel fails; what `Line.check_alive` raises when the guest dies.
        """

    def poll(self) -> int | None:
        """Take what has come by now, without waiting for more; returns the `returncode`."""

    def wait(self, deadline: Deadline) -> int | None:
        """Block until it has ended; returns the `returncode`, None where it is lost. Raises as `read` does."""

    def signal(self, number: int) -> None:
        """Send a signal to it and to what it has started that is in its process group; nothing for one that has ended."""

    def kill(self) -> None:
        """End it and all that it has started, without waiting for that."""


@runtime_checkable
class StartingChannel(Channel, Protocol):
    """A channel by which processes can run beside the test."""

    def popen(self, command: str | Sequence[str], *, input: bytes | None) -> Process:
        """Start a process in the guest and return it, once it runs.

        Of each of its outputs a bounded part is kept that nobody has read; then it has to wait where it prints.
        Raises CommandTimeoutError where it is not started in time; else what `run` raises.
        """


@runtime_checkable
class RenewingChannel(Channel, Protocol):
    """A channel whose end in the guest can be saved with it, and then makes a clone a machine of its own."""

    def waiting(self, line: Callable[[str], str]) -> AbstractContextManager[None]:
        """Have the guest wait for its renewal in the block, as a snapshot has to find it; afterwards it goes on.

        `line` makes the shell line after which it waits, of the token that it says then. Raises VmIOError where it does not.
        """

    def renew(self, message: Callable[[], bytes], line: str, deadline: Deadline) -> None:
        """Have a clone renewed that was `waiting` when it was saved, and then run a shell line.

        `message` makes what the guest is told when it asks for it. Raises VmIOError where it does not ask in time.
        """


def open_channel(kind: str, line: Line) -> Channel:
    """Return a channel of a kind, the name of a module in this package, to a VM's guest."""
    return cast("Channel", import_module(f"{__name__}.{kind}").open_channel(line))

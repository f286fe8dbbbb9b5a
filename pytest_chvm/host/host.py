"""`Host`: all that one run uses of the host in this process. Two hosts in one process do not know of each other."""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pytest_chvm.base.progress import show_progress
from pytest_chvm.host.keeper_client import Keeper
from pytest_chvm.host.names import LiveNames
from pytest_chvm.host.runs import Run, Started
from pytest_chvm.model import Network, ProcessIdentity

if TYPE_CHECKING:
    from ipaddress import IPv4Address

Uncaptured = Callable[[], AbstractContextManager[object]]


class Held(Protocol):
    """A lock that is held."""

    @property
    def name(self) -> str:
        """The name of its file."""

    def release(self) -> None:
        """Let go of it."""


class Host:
    """What one run has of the host: its keeper, leases and locks, the names and numbers of its VMs, its networks' addresses.

    `close` gives it back, as does the end of the process. Only the process that made a host ends what belongs to it: in a forked
    child it starts empty. `uncaptured` is a context in which what is written reaches the person at the terminal.
    """

    def __init__(self, run: Run | None = None, uncaptured: Uncaptured = nullcontext) -> None:
        self.end_run()
        self.begin_run(run or Run(), uncaptured)
        self.names = LiveNames()
        # Those that are held, with the directories of the leases that they are in.
        self.locks: dict[Held, Path] = {}
        self.lease_numbers = itertools.count(1)
        # Of VMs without a name.
        self.vm_numbers = itertools.count(1)
        self.clone_numbers = itertools.count(1)
        # Of each network of several VMs, not of each name: two may have the same.
        self.next_addresses: dict[Network, Iterator[IPv4Address]] = {}
        # Those that were chosen by settings, by what those say.
        self.drivers: dict[object, Any] = {}
        self._keepers: list[Keeper] = []
        self._lock = threading.Lock()
        _hosts.append(weakref.ref(self, _hosts.remove))

    def begin_run(self, run: Run, uncaptured: Uncaptured = nullcontext) -> None:
        """Have what is started from now on belong to a run."""
        self.run = run
        self.started.journal = run.journal
        self._uncaptured = uncaptured

    def end_run(self) -> None:
        """Have what is started from now on belong to no run, and be counted from nothing."""
        self.started = Started()
        self.begin_run(Run())

    def show_progress(self, text: str) -> None:
        """Tell the person at the terminal what takes long just now."""
        show_progress(text, self._uncaptured)

    def keeper(self) -> Keeper:
        """Return the keeper, started at the first call, and anew after a keeper was killed or lost its directory."""
        with self._lock:
            last = self._keepers[-1] if self._keepers else None
            if last is None or not last.is_alive or not last.has_directory:
                if not self._keepers:
                    atexit.register(self.close)
                self._close(gone=True)
                last = Keeper(self.run)
                self._keepers.append(last)
            return last

    def keeper_of(self, process: ProcessIdentity) -> Keeper | None:
        """Return the keeper that has started a process; None where this host has not started it."""
        return next((keeper for keeper in list(self._keepers) if keeper.has_started(process)), None)

    def close(self) -> list[str]:
        """End the keepers with all that is left, and wait for them; returns what could not be removed, in words."""
        with self._lock:
            failures = self._close()
            if not self._keepers:
                atexit.unregister(self.close)
        return failures

    def _close(self, *, gone: bool = False) -> list[str]:
        failures = []
        for keeper in [keeper for keeper in self._keepers if not (gone and keeper.is_alive)]:
            failed = keeper.close(lambda directory=keeper.directory: self._release_locks(directory))  # type: ignore[misc]
            # What this process itself has open still cannot be removed yet: the rest goes at the end of the process. Nor is one
            # forgotten before: an interrupted close is begun again then.
            if not (gone and failed):
                self._keepers.remove(keeper)
            failures += failed
        return failures

    def _release_locks(self, keeper_directory: Path) -> None:
        """Give back what is held for the leases of a keeper, which it would leave alone: an interrupted teardown has not."""
        for lock, lease_directory in list(self.locks.items()):
            if lease_directory.parent == keeper_directory:
                lock.release()

    def forget(self) -> None:
        """Let go of the keepers, in a forked child: they are the parent's."""
        self._lock = threading.Lock()
        while self._keepers:
            self._keepers.pop().forget()


# Of this process, whoever has made them: for a forked child to let go of, and to find who has started a process.
_hosts: list[weakref.ref[Host]] = []
_default = Host()


def default_host() -> Host:
    """Return this process's default host: that of `launch` without `host=`, and of the outermost pytest run."""
    return _default


def keeper_of(process: ProcessIdentity) -> Keeper | None:
    """Return the keeper that has started a process; None where it was another process's."""
    return next((keeper for host in _all_hosts() if (keeper := host.keeper_of(process)) is not None), None)


def _all_hosts() -> list[Host]:
    return [host for reference in list(_hosts) if (host := reference()) is not None]


def _forget_all() -> None:
    for host in _all_hosts():
        host.forget()


os.register_at_fork(after_in_child=_forget_all)

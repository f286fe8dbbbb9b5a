"""Locks common to all users of the machine: files that exist only while somebody holds them."""

from __future__ import annotations

import os
from pathlib import Path

from pytest_chvm.base.deadline import Deadline
from pytest_chvm.base.lockfiles import holder, holder_in_words, remove_free_lock
from pytest_chvm.base.watch import FileWatch
from pytest_chvm.errors import HostError
from pytest_chvm.host.directories import common_lock_dir
from pytest_chvm.host.host import Held
from pytest_chvm.host.leases import Lease

# All but those that may be tried for nothing are this process's own, by their names.
LOCK_TIMEOUT_S = 30.0


class HeldLock:
    """A lock file that this process holds until `release`; the kernel drops it when the process ends."""

    def __init__(self, name: str, lease: Lease, *, timeout_s: float = LOCK_TIMEOUT_S) -> None:
        """Take the lock `name`, waiting at most `timeout_s`; raises HostError, or TimeoutError where that is 0.

        It is in the lease first, so that whoever outlives this process removes the file.
        """
        from filelock import FileLock

        self._owner_pid = os.getpid()
        self._host = lease.host
        deadline = Deadline.after(timeout_s)
        while True:
            path = common_lock_dir() / name
            lease.add_lock(path)
            # From 3.24 on filelock follows no links, and makes a file anew that was removed while it waited.
            self._lock = FileLock(
                path, timeout=deadline.remaining_s, mode=0o666, is_singleton=False, thread_local=False, poll_interval=0.01
            )
            try:
                # No wait at all for a timeout of 0: filelock would wait by a clock that a test may have frozen.
                self._lock.acquire(blocking=timeout_s != 0)
                break
            except FileNotFoundError:
                # The last holder has removed the directory.
                continue
            except TimeoutError:
                if timeout_s == 0:
                    raise
                raise HostError(f"{path} was not to be had within {timeout_s:g} s: {_holder(path)} has it") from None
            except PermissionError:
                # Another user's file, which the kernel does not let us open (fs.protected_regular); its holder removes it.
                if deadline.expired:
                    kind = TimeoutError if timeout_s == 0 else HostError
                    raise kind(f"{path} is held by another user") from None
                _wait_until_gone(path, deadline)
        self._host.locks[self] = lease.directory

    @property
    def name(self) -> str:
        """The name of its file."""
        return Path(self._lock.lock_file).name

    def release(self) -> None:
        """Release the lock and remove its file. Does nothing a second time, or in a forked child."""
        self._host.locks.pop(self, None)
        # The file at the path may belong to another holder by now.
        if not self._lock.is_locked or self._owner_pid != os.getpid():
            return
        self._lock.release()
        remove_free_lock(self._lock.lock_file)


def _holder(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return holder_in_words(holder(file.fileno()))
    except OSError:
        return holder_in_words(None)


def _wait_until_gone(path: Path, deadline: Deadline) -> None:
    try:
        with FileWatch(path.parent) as watch:
            if path.exists():
                # A holder that is killed leaves the file, without an event.
                watch.wait(Deadline.after(min(1.0, deadline.remaining_s)))
    except FileNotFoundError:
        return


def held_under(lease: Lease) -> list[Held]:
    """Return the locks in a lease that are still held."""
    return [lock for lock, directory in list(lease.host.locks.items()) if directory == lease.directory]

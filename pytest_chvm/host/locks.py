"""Locks common to all users of the machine: files that are there only while somebody holds them."""

from __future__ import annotations

import atexit
import os
from pathlib import Path

from pytest_chvm.host.directories import common_lock_dir
from pytest_chvm.host.leases import Lease


class HeldLock:
    """A lock file that this process holds until `release`; the kernel drops it when the process ends."""

    def __init__(self, name: str, lease: Lease, *, timeout_s: float = -1) -> None:
        """Take the lock `name`, waiting at most `timeout_s` (negative: as long as it takes); raises TimeoutError.

        It is in the lease first, so that whoever outlives this process removes the file.
        """
        from filelock import FileLock

        self._owner_pid = os.getpid()
        while True:
            path = common_lock_dir() / name
            lease.add_lock(path)
            self._lock = FileLock(path, timeout=timeout_s, mode=0o666, is_singleton=False, thread_local=False, poll_interval=0.01)
            try:
                self._lock.acquire()
                break
            except FileNotFoundError:
                # The last one who left took the directory along.
                continue
        # An interrupted teardown gives nothing back, and the keeper leaves a lock that this process still holds.
        atexit.register(self.release)

    @property
    def name(self) -> str:
        """The name of its file."""
        return Path(self._lock.lock_file).name

    def release(self) -> None:
        """Give it back; its file goes too. Once more, or in a forked child, it does nothing."""
        atexit.unregister(self.release)
        # The file may be somebody else's by now.
        if not self._lock.is_locked or self._owner_pid != os.getpid():
            return
        path = Path(self._lock.lock_file)
        # Unlinked while it is held: whoever waits for it sees that its file is gone, and makes a new one.
        path.unlink(missing_ok=True)
        self._lock.release()
        try:
            path.parent.rmdir()
        except OSError:
            # Other locks are in it.
            return

"""Lock files (flock(2)): taking and waiting for a lock, finding its holder, removing lock files that nobody holds.

Standard library only, as little of it as possible, and nothing of this package: the keeper runs it too. Locks of the whole machine,
which are in a lease, are in `pytest_chvm.host.locks`, by filelock: their files come and go, and other users' are among them.
"""

from __future__ import annotations

import fcntl
import os
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LOOK_AGAIN_S = 0.05
PATIENCE_BEFORE_MESSAGE_S = 3.0
# A holder may be building something for long, but not while it is stopped.
STOPPED_TIMEOUT_S = 30.0


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Lock an open file if nobody has it; tells whether it is ours now, until it is closed."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(fd: int, what: str, tell: Callable[[str], None], *, shared: bool = False) -> bool:
    """Lock an open file, waiting while another process holds the lock; returns whether it had to wait.

    After a few seconds `tell` is told who the holder is. Raises TimeoutError where the holder has been stopped (Ctrl-Z) for half a
    minute.
    """
    if try_lock(fd, shared=shared):
        return False
    begun = running_at = time.clock_gettime(time.CLOCK_MONOTONIC)
    told = False
    pause = select.poll()
    while not try_lock(fd, shared=shared):
        # Nothing but waiting without a deadline is woken when the lock is given back, so it is tried again and again.
        pause.poll(LOOK_AGAIN_S * 1000)
        now = time.clock_gettime(time.CLOCK_MONOTONIC)
        if now - begun < PATIENCE_BEFORE_MESSAGE_S:
            continue
        pid = holder(fd)
        if not told:
            told = True
            tell(f"{what} is waited for: {holder_in_words(pid)} has it")
        if pid is None or not is_stopped(pid):
            running_at = now
        elif now - running_at > STOPPED_TIMEOUT_S:
            raise TimeoutError(f"{what} was waited for for {now - begun:.0f} s: {holder_in_words(pid)} has it")
    return True


def holder(fd: int) -> int | None:
    """Return the process that has an open file locked (proc(5), locks); None where nobody has, as far as this one can see."""
    found = os.fstat(fd)
    inode = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with open("/proc/locks") as table:
        rows = [line.split() for line in table]
    # "->" marks a process that waits for the lock.
    pids = [int(row[4]) for row in rows if len(row) > 5 and row[1] == "FLOCK" and row[5] == inode]
    return next((pid for pid in pids if pid > 0), None)


def holder_in_words(pid: int | None) -> str:
    """Say who holds a lock, and what to do where that process is stopped."""
    if pid is None:
        return "another process"
    if is_stopped(pid):
        return f"pid {pid}, which is stopped (go on with 'kill -CONT {pid}', or end it),"
    return f"pid {pid}"


def is_stopped(pid: int) -> bool:
    """Tell whether a process is stopped by a signal or a debugger; False where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return False
    # The command name before it is in parentheses and may have any in it.
    return stat[stat.rindex(b")") + 2 :][:1] in (b"T", b"t")


def is_locked(path: str) -> bool:
    """Tell whether a process holds a lock on a file; False where there is no such file."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(fd)
    finally:
        os.close(fd)


def remove_free_lock(path: str) -> list[str]:
    """Remove a lock file that nobody holds, and its directory if that leaves it empty; returns failures in words."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"{path}: {error}"]
    try:
        # The file was removed before this process had locked it: another file is at the path now.
        if try_lock(fd) and os.fstat(fd).st_nlink:
            os.unlink(path)
            os.rmdir(os.path.dirname(path))
    except OSError:
        # The directory is another user's, or has other locks in it: theirs to remove.
        return []
    finally:
        os.close(fd)
    return []

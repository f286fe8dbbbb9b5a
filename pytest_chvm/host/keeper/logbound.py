"""Bounds for logs that grow: the middle of a log that is too long is given back to the file system.

A hole is punched, so the log keeps its length and neither its writer nor its readers notice. The keeper loads this module at its
start: small parts of the standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# How much is kept of the beginning and the end of such a log; `vm.console` reads less than the end.
LIMIT = 256 << 20
HEAD = 1 << 20
TAIL = 64 << 20
INTERVAL_S = 1.0

# What a file system gives back, in most: a hole that begins and ends with a block leaves no zeros around it.
BLOCK = 4096
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
# A number of one width: the next note takes the place of the one before.
NOTE = b"\n--- pytest-chvm: %12d KiB of this log were dropped here, to spare the disk ---\n"

_libc = ctypes.CDLL(None, use_errno=True)


class BoundedLogs:
    """The logs of running programs, and the position up to which each was given back; call `check` after `wait_ms`."""

    def __init__(self) -> None:
        self.bounds: dict[str, tuple[int, int, int]] = {}
        self.dropped_to: dict[str, int] = {}
        self.logs_of: dict[int, list[str]] = {}
        self.due = 0.0

    def add(self, pid: int, logs: Iterable[str], bound: tuple[int, int, int]) -> None:
        """Watch a program's logs; `bound` is the limit, and what is kept of the beginning and of the end, in bytes."""
        self.logs_of[pid] = list(logs)
        for log in self.logs_of[pid]:
            self.bounds[log] = bound
            self.dropped_to.setdefault(log, 0)

    def forget(self, pid: int) -> None:
        """Stop watching the logs of a program that has ended."""
        ended = set(self.logs_of.pop(pid, []))
        # Two virtiofsds that serve a share one after the other have the same log.
        for log in ended.difference(*self.logs_of.values()):
            self.bounds.pop(log, None)
            self.dropped_to.pop(log, None)

    def wait_ms(self) -> int | None:
        """Return in how many ms `check` is due; None without logs."""
        return max(0, int((self.due - time.monotonic()) * 1000) + 1) if self.bounds else None

    def check(self) -> None:
        """Shorten logs that are too long, if that is due. A log that cannot be shortened gets a line saying so, and stays."""
        if not self.bounds or time.monotonic() < self.due:
            return
        self.due = time.monotonic() + INTERVAL_S
        for log, bound in list(self.bounds.items()):
            try:
                self.dropped_to[log] = shorten(log, bound, self.dropped_to[log])
            except FileNotFoundError:
                continue
            except OSError as error:
                del self.bounds[log]
                say(log, f"this log cannot be bounded: {error.strerror}")


def shorten(log: str, bound: tuple[int, int, int], dropped_to: int) -> int:
    """Give back the middle of a log that is longer than its limit; returns up to where that has been done.

    Raises OSError where the file system has no holes (EOPNOTSUPP).
    """
    limit, head, tail = bound
    status = os.stat(log)
    if not stat.S_ISREG(status.st_mode):
        return 0
    start = head - head % BLOCK
    if status.st_size < dropped_to:
        # The VMM has truncated it.
        dropped_to = 0
    if status.st_size - max(0, dropped_to - start) <= limit:
        return dropped_to
    end = status.st_size - tail
    end -= end % BLOCK
    fd = os.open(log, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = ctypes.c_int(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
        while _libc.fallocate(fd, mode, ctypes.c_int64(start), ctypes.c_int64(end - start)) != 0:
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))
        note = NOTE % ((end - start) >> 10)
        os.pwrite(fd, note, start - len(note))
    finally:
        os.close(fd)
    return end


def say(log: str, what: str) -> None:
    """Add a line to a log, where that can be done."""
    try:
        fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.write(fd, b"pytest-chvm: %s\n" % what.encode(errors="replace"))
    except OSError:
        # The disk is full; the log's end shows it.
        return
    finally:
        os.close(fd)

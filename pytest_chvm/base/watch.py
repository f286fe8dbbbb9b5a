"""Waiting for something to happen to a file, or for a process to end, whichever comes first."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from pytest_chvm.base.deadline import Deadline, wait_readable
from pytest_chvm.base.pidfds import open_pidfd

# Where the user has no inotify(7) instance left (fs.inotify.max_user_instances: 128 by default, editors and all) or no watch.
LOOK_AGAIN_S = 0.05
CLOCK_MONOTONIC = 1


class FileWatch:
    """Wakes on every change in directories or of files; a context manager.

    By inotify(7); where the user has no instance left, it wakes every 50 ms instead.
    """

    def __init__(self, *paths: Path) -> None:
        self._source = _source(paths)

    def fileno(self) -> int:
        """The descriptor that is readable when something changed."""
        return self._source.fileno()

    def clear(self) -> set[str]:
        """Take note of the changes so far; returns the names of the files in watched directories that may have changed."""
        return self._source.clear()

    def wait(self, deadline: Deadline, pid: int | None = None) -> bool:
        """Block until something changes, the process ends or the deadline passes; True when the process has ended."""
        pidfd = None
        if pid is not None:
            try:
                pidfd = open_pidfd(pid)
            except ProcessLookupError:
                return True
        try:
            ready = wait_readable([self.fileno(), *([] if pidfd is None else [pidfd])], deadline)
        finally:
            if pidfd is not None:
                os.close(pidfd)
        if self.fileno() in ready:
            self.clear()
        return pidfd in ready

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None) -> None:
        self._source.close()


class _Source(Protocol):
    def fileno(self) -> int: ...

    def clear(self) -> set[str]: ...

    def close(self) -> None: ...


def _source(paths: tuple[Path, ...]) -> _Source:
    try:
        return _Inotify(paths)
    except FileNotFoundError:
        raise
    except OSError:
        return _Timer(paths)


class _Inotify:
    def __init__(self, paths: tuple[Path, ...]) -> None:
        from inotify_simple import INotify, flags

        self._inotify = INotify()
        try:
            for path in paths:
                self._inotify.add_watch(path, flags.CREATE | flags.MODIFY | flags.MOVED_TO | flags.DELETE)
        except BaseException:
            self._inotify.close()
            raise

    def fileno(self) -> int:
        return int(self._inotify.fileno())

    def clear(self) -> set[str]:
        return {str(event.name) for event in self._inotify.read(timeout=0)}

    def close(self) -> None:
        self._inotify.close()


class _Timer:
    def __init__(self, paths: tuple[Path, ...]) -> None:
        import ctypes

        for path in paths:
            path.stat()
        self._paths = paths
        # os.timerfd_create is there from Python 3.13 on.
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.timerfd_create(CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{os.strerror(number)} (timerfd_create)")
        # struct itimerspec: the interval and the first time, each in seconds and nanoseconds.
        libc.timerfd_settime(self._fd, 0, (ctypes.c_long * 4)(0, int(LOOK_AGAIN_S * 1e9), 0, int(LOOK_AGAIN_S * 1e9)), None)

    def fileno(self) -> int:
        return int(self._fd)

    def clear(self) -> set[str]:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return set()
        return {name for path in self._paths if path.is_dir() for name in os.listdir(path)}

    def close(self) -> None:
        os.close(self._fd)

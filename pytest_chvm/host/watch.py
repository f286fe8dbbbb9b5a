"""Waiting for something to happen to a file, or for a process to end, whichever comes first."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from pytest_chvm.deadline import Deadline, wait_readable


class FileWatch:
    """Wakes on every change below directories, or of files (inotify(7)); a context manager."""

    def __init__(self, *paths: Path) -> None:
        from inotify_simple import INotify, flags

        self._inotify = INotify()
        for path in paths:
            self._inotify.add_watch(path, flags.CREATE | flags.MODIFY | flags.MOVED_TO | flags.DELETE)

    def fileno(self) -> int:
        """The descriptor that is readable when something changed."""
        return int(self._inotify.fileno())

    def clear(self) -> set[str]:
        """Take note of the changes so far; returns the names of the files in watched directories that they were of."""
        return {str(event.name) for event in self._inotify.read(timeout=0)}

    def wait(self, deadline: Deadline, pid: int | None = None) -> bool:
        """Block until something changes, the process ends or the deadline passes; True when the process has ended."""
        pidfd = None
        if pid is not None:
            try:
                pidfd = os.pidfd_open(pid)
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
        self._inotify.close()

"""A lease: what one VM has from the host, written down before it is made, and given back in reverse."""

from __future__ import annotations

import itertools
import json
import os
import threading
from pathlib import Path

from pytest_chvm.host import remains
from pytest_chvm.host.processes import keeper

_numbers = itertools.count(1)


class Lease:
    """The run directory of one VM, and the record of all that it has elsewhere.

    Whoever outlives this process (the keeper, a later run) removes what the record names, so each entry is
    added before the thing itself is made.
    """

    def __init__(self) -> None:
        self.directory = keeper().directory / str(next(_numbers))
        self._record: dict[str, list[object]] = {}
        self._lock = threading.Lock()
        self.directory.mkdir(mode=0o700)

    def add_tap(self, name: str, netns: str | None) -> None:
        """Record a TAP that is to be removed."""
        self._add("taps", {"name": name, "netns": netns})

    def add_bridge(self, name: str) -> None:
        """Record a bridge that is to be removed."""
        self._add("bridges", name)

    def add_path(self, path: Path) -> None:
        """Record a file or directory outside the run directory that is to be removed."""
        self._add("paths", os.fspath(path))

    def add_lock(self, path: Path) -> None:
        """Record a lock file that is to be removed once nobody holds it."""
        self._add("locks", os.fspath(path))

    def _add(self, kind: str, entry: object) -> None:
        with self._lock:
            self._record.setdefault(kind, []).append(entry)
            unfinished = self.directory / "lease.new"
            unfinished.write_text(json.dumps(self._record))
            unfinished.replace(self.directory / remains.LEASE_FILE)

    def release(self) -> list[str]:
        """End and remove all that is left of it; returns what could not be removed, in words."""
        return remains.remove_lease(self.directory, search=False)

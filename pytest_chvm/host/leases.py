"""A lease: all that one VM uses of the host, recorded before it is made and removed in reverse order."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from pytest_chvm.errors import HostError
from pytest_chvm.host.host import Host
from pytest_chvm.host.keeper import records, remains


class Lease:
    """The run directory of one VM, and the record of all that it has elsewhere.

    Whoever outlives this process (the keeper, a later run) removes what the record names, so each entry is
    added before the thing itself is made. Only the process that made the lease releases it, never a forked child. Raises
    HostError where it cannot be written, as on a full disk.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self._owner_pid = os.getpid()
        self.keeper = host.keeper()
        self.directory = self.keeper.directory / str(next(host.lease_numbers))
        self._record: dict[str, list[object]] = {}
        self._vm: dict[str, object] = {}
        self._lock = threading.Lock()
        try:
            self.directory.mkdir(mode=0o700)
        except OSError as error:
            raise self._not_written(error) from error

    def describe(self, **facts: object) -> None:
        """Record what people are to know of the VM: `test`, `worker`, `name`, `vmm`, `memory_mb`, `events` (its event log)..."""
        with self._lock:
            self._vm.update(facts)
            self._write()

    def add_tap(self, name: str, netns: str | None) -> None:
        """Record a TAP that is to be removed."""
        self._add("taps", {"name": name, "netns": netns})

    def add_bridge(self, name: str) -> None:
        """Record a bridge that is to be removed."""
        self._add("bridges", name)

    def forget_bridge(self, name: str) -> None:
        """Take a bridge out of the record that could not be made because somebody else has one of that name."""
        with self._lock:
            self._record["bridges"].remove(name)
            self._write()
            self.keeper.remember(self.directory, self._record)

    def add_path(self, path: Path) -> None:
        """Record a file or directory outside the run directory that is to be removed."""
        self._add("paths", os.fspath(path))

    def add_lock(self, path: Path) -> None:
        """Record a lock file that is to be removed once nobody holds it."""
        self._add("locks", os.fspath(path))

    def _add(self, kind: str, entry: object) -> None:
        with self._lock:
            if entry in self._record.setdefault(kind, []):
                return
            self._record[kind].append(entry)
            self._write()
            self.keeper.remember(self.directory, self._record)

    def _write(self) -> None:
        unfinished = self.directory / "lease.new"
        try:
            unfinished.write_text(json.dumps({**self._record, "vm": self._vm}))
            unfinished.replace(self.directory / records.LEASE_FILE)
        except FileNotFoundError:
            # Somebody has removed the directory. This process and its keeper know what is in the record.
            return
        except OSError as error:
            raise self._not_written(error) from error

    def _not_written(self, error: OSError) -> HostError:
        return HostError(
            f"the run directory {str(self.directory)!r} cannot be written: {error.strerror}; free it, or set XDG_RUNTIME_DIR"
        )

    def left(self) -> list[str]:
        """Return in words what of it still exists, also where somebody has removed the directory."""
        with self._lock:
            taps, bridges, paths = (list(self._record.get(kind, ())) for kind in ("taps", "bridges", "paths"))
        left = records.left_of(os.fspath(self.directory))
        left += [f"TAP {tap['name']}" for tap in taps if remains.interface_is_there(tap["name"], tap["netns"])]  # type: ignore[index]
        left += [f"bridge {name}" for name in bridges if remains.interface_is_there(str(name), None)]
        left += [str(path) for path in paths if os.path.lexists(str(path))]
        return list(dict.fromkeys(left))

    def release(self, *, search: bool = False) -> list[str]:
        """End and remove all that is left of it; returns what could not be removed, in words.

        `search`: look for processes of the lease that still run, and end them.
        """
        if os.getpid() != self._owner_pid:
            return []
        recorded = (self.directory / records.LEASE_FILE).exists()
        failures = records.remove_lease(self.directory, search=search)
        if not recorded:
            failures += records.remove_named(self._record)
        if not failures:
            self.keeper.remember(self.directory, None)
        return failures

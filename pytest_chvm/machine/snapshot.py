"""A VM that a test saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_chvm.base.untouched import random_hex
from pytest_chvm.errors import VmIOError
from pytest_chvm.host.leases import Lease

if TYPE_CHECKING:
    from pytest_chvm.machine.vm import Vm


class Snapshot:
    """A VM that a test saved. `clone()` starts another from there, any number of times; `close` removes it."""

    def __init__(
        self, names: Iterator[str], directory: Path, start: Callable[[str, Path, bool], Vm], remove: Callable[[], list[str]]
    ):
        self.directory = directory
        self._names = names
        self._start = start
        self._remove = remove
        self._closed = False
        # Called with the name of each clone.
        self.on_clone: Callable[[str], None] = lambda _name: None

    def clone(self, name: str | None = None, *, wait: bool = True) -> Vm:
        """Start a VM from the snapshot, a machine of its own, and return it when it is ready, or at once with `wait=False`.

        It has the saved VM's memory and running programs, and a name, addresses, host name, clock and random pool of its own.
        It ends with the fixture or test that made it, or with its `close`. Raises what `launch` does.
        """
        name = next(self._names) if name is None else name
        if self._closed:
            raise VmIOError(f"VM {name!r} cannot be cloned: its snapshot was closed; close it after its last clone()", vm_name=name)
        self.on_clone(name)
        return self._start(name, self.directory, wait)

    def close(self) -> list[str]:
        """Remove it; clones that run go on, but one with a root disk cannot be saved any more.

        Returns what could not be removed, in words.
        """
        self._closed = True
        return self._remove()


def snapshots_dir(cache: Path) -> Path:
    """Return the directory in which tests' own snapshots are, each in one of its own; it is made where it can be."""
    directory = cache / "snapshots"
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
    return directory


def new_directory(parent: Path, lease: Lease) -> Path:
    """Return a new empty directory for a test's own snapshot, in the lease first."""
    directory = parent / random_hex(8)
    lease.add_path(directory)
    directory.mkdir(mode=0o700)
    return directory

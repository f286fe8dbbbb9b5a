"""Where the snapshots that tests make are kept."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from pytest_chvm.base.untouched import random_hex
from pytest_chvm.host.leases import Lease


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

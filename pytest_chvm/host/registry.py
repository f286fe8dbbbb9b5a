"""What the records of this user's processes say: who has VMs, and what is left of processes that have gone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_chvm.base.deadline import Deadline
from pytest_chvm.base.pidfds import open_pidfd
from pytest_chvm.base.text import clean_text
from pytest_chvm.host.directories import runtime_dirs
from pytest_chvm.host.keeper import records, remains

# As Linux allows for a path; everything else is shorter.
LONGEST_TEXT = 4096


def owners(problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the directory and the record of each process of this user's that has VMs; `problems`: what could not be understood."""
    for place in runtime_dirs():
        for name in sorted(os.listdir(place)):
            directory = os.path.join(place, name)
            try:
                yield directory, records.read_owner(directory)
            except FileNotFoundError:
                # About to be made, or to go.
                continue
            except (OSError, ValueError) as error:
                problems.append(f"{shown(directory)} is not understood: {shown(str(error))}")


def shown(text: str) -> str:
    """Return a text of a record, which came from a test, as a terminal may have it."""
    return clean_text(text[:LONGEST_TEXT]).replace("\n", "\ufffd").replace("\t", " ")


def reap(*, dry_run: bool = False) -> tuple[list[str], list[str]]:
    """Remove what processes of this user's left that are gone; returns what was removed and what could not be, in words."""
    removed: list[str] = []
    failures: list[str] = []
    for place in runtime_dirs():
        gone, kept = records.remove_abandoned(place, dry_run=dry_run)
        removed += gone
        failures += kept
        if not dry_run and gone:
            try:
                place.rmdir()
            except OSError:
                # Somebody else's is in it.
                continue
    return [shown(text) for text in removed], [shown(text) for text in failures]


def clean_up_after_worker(run: str, worker: str, timeout_s: float) -> list[str]:
    """Wait until the keeper of a worker that has crashed has cleaned up; do it where the keeper is gone too.

    Returns what could not be removed, in words.
    """
    deadline = Deadline.after(timeout_s)
    failures = []
    for directory, owner in owners([]):
        if (owner["run"], owner["worker"]) != (run, worker):
            continue
        for pid, ticks in records.read_pairs(os.path.join(directory, records.LOCK_FILE)).items():
            _wait_ended(pid, ticks, deadline)
        if Path(directory).is_dir() and records.is_abandoned(directory, owner):
            failures += records.remove_owner_directory(directory)
    return failures


def _wait_ended(pid: int, ticks: int, deadline: Deadline) -> None:
    try:
        pidfd = open_pidfd(pid)
    except ProcessLookupError:
        return
    try:
        if remains.start_time_ticks(pid) == ticks:
            remains.pidfd_ended(pidfd, deadline.remaining_s)
    finally:
        os.close(pidfd)


def left_by(run: str) -> list[str]:
    """Return what is there of a run that has ended, in words."""
    left = []
    for directory, owner in owners([]):
        if owner["run"] != run:
            continue
        leases = records.leases_of(directory)
        left += [what for lease in leases for what in records.left_of(lease)] or [directory]
    return [shown(text) for text in left]

"""What the records of this user's processes say: which VMs run, and what is left of processes that have gone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_chvm.base.deadline import Deadline
from pytest_chvm.base.text import clean
from pytest_chvm.host.directories import runtime_dirs
from pytest_chvm.host.keeper import records, remains

# As Linux allows for a path; everything else is shorter.
LONGEST_TEXT = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class VmEntry:
    """A VM in the records: `age_s` seconds since its VMM started, `memory_mb` MiB; None is what is not known (yet).

    `state` is "waiting" (for memory, or its VMM to start), "booting", "ready", "ended", or "abandoned": nobody is there who would
    clean up. `owner_pid` is the test process.
    """

    name: str
    state: str
    test: str | None
    worker: str | None
    age_s: float | None
    memory_mb: int | None
    cpus: int | None
    ip: str | None
    console: str | None
    vmm: str | None
    pid: int | None
    owner_pid: int
    directory: str


def running_vms() -> tuple[list[VmEntry], list[str]]:
    """Return the VMs in the records of this user's processes, the oldest first, and what could not be understood, in words."""
    found: list[VmEntry] = []
    problems: list[str] = []
    for directory, owner in _owners(problems):
        same_boot = owner["boot_id"] == remains.boot_id()
        abandoned = records.is_abandoned(directory, owner)
        for lease in records.leases_of(directory):
            try:
                vm = records.read_lease(lease).get("vm", {})
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                problems.append(f"{_shown(lease)} is not understood: {_shown(str(error))}")
                continue
            # A network has a lease too.
            if isinstance(vm.get("name"), str):
                found.append(_entry(vm, owner, lease, same_boot=same_boot, abandoned=abandoned))
    return sorted(found, key=lambda vm: -(vm.age_s or 0)), problems


def _owners(problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for place in runtime_dirs():
        for name in sorted(os.listdir(place)):
            directory = os.path.join(place, name)
            try:
                yield directory, records.read_owner(directory)
            except FileNotFoundError:
                # About to be made, or to go.
                continue
            except (OSError, ValueError) as error:
                problems.append(f"{_shown(directory)} is not understood: {_shown(str(error))}")


def _entry(vm: dict[str, Any], owner: dict[str, Any], lease: str, *, same_boot: bool, abandoned: bool) -> VmEntry:
    pid, ticks = _number(vm.get("pid")), _number(vm.get("start_time_ticks"))
    runs = same_boot and pid is not None and ticks is not None and remains.start_time_ticks(pid) == ticks
    state = "waiting" if pid is None else "ended" if not runs else "ready" if vm.get("ip") else "booting"
    age_s = None
    if runs and ticks is not None:
        age_s = max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return VmEntry(
        name=_shown(vm["name"]),
        state="abandoned" if abandoned else state,
        test=_text(vm.get("test")),
        worker=_text(vm.get("worker")),
        age_s=age_s,
        memory_mb=_number(vm.get("memory_mb")),
        cpus=_number(vm.get("cpus")),
        ip=_text(vm.get("ip")),
        console=_text(vm.get("console")),
        vmm=_text(vm.get("vmm")),
        pid=pid,
        owner_pid=owner["pid"],
        directory=_shown(lease),
    )


def _number(value: object) -> int | None:
    return value if type(value) is int and 0 < value < 1 << 63 else None


def _text(value: object) -> str | None:
    return _shown(value) if isinstance(value, str) else None


def _shown(text: str) -> str:
    # What is in a record came from a test, and goes to a terminal.
    return clean(text[:LONGEST_TEXT].encode(errors="surrogateescape")).replace("\n", "\ufffd").replace("\t", " ")


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
    return [_shown(text) for text in removed], [_shown(text) for text in failures]


def clean_up_after_worker(run: str, worker: str, timeout_s: float) -> list[str]:
    """Wait until the keeper of a worker that has crashed has cleaned up; do it where the keeper is gone too.

    Returns what could not be removed, in words.
    """
    deadline = Deadline.after(timeout_s)
    failures = []
    for directory, owner in _owners([]):
        if (owner["run"], owner["worker"]) != (run, worker):
            continue
        for pid, ticks in records.read_pairs(os.path.join(directory, records.LOCK_FILE)).items():
            _wait_ended(pid, ticks, deadline)
        if Path(directory).is_dir() and records.is_abandoned(directory, owner):
            failures += records.remove_owner_directory(directory)
    return failures


def _wait_ended(pid: int, ticks: int, deadline: Deadline) -> None:
    try:
        pidfd = os.pidfd_open(pid)
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
    for directory, owner in _owners([]):
        if owner["run"] != run:
            continue
        leases = records.leases_of(directory)
        left += [what for lease in leases for what in records.left_of(lease)] or [directory]
    return [_shown(text) for text in left]

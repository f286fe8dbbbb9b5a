"""The budget of all VMs of all runs on this machine, and waiting for room in it.

Each VM that runs has a *share*: a file in the directory of locks common to all users, named after what it takes and locked by
the process that holds it, so that the kernel gives back the share of a process that crashed. While it boots, a VM has a second
share for its processors. A waiting process has a *ticket*, a file of the same kind; the oldest ticket that is held goes first, so
that small VMs cannot pass a large one for ever. Tickets of stopped processes (Ctrl-Z) are passed over.

No lock is held between looking and taking, so no process can be stopped while it holds one. Instead a process that has taken a
share looks again, and gives it back if the budget is exceeded: of several that take at once, the last one to look sees all others.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pytest_chvm.base.deadline import Deadline, wait_readable
from pytest_chvm.base.lockfiles import is_locked, is_stopped, remove_free_lock
from pytest_chvm.base.pidfds import open_pidfd
from pytest_chvm.base.untouched import monotonic_ns
from pytest_chvm.base.watch import FileWatch
from pytest_chvm.errors import MissingRequirementError
from pytest_chvm.host import limits
from pytest_chvm.host.directories import common_lock_dir
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.locks import HeldLock

# Of the memory that this process may have at all: the rest is for the host, and for what a VMM needs beside its guest.
DEFAULT_PART = 0.9
# Of booting VMs: with more, each becomes so slow that its boot may time out. A VM with more processors than that boots alone.
# Once they are up, guests in tests wait more than they compute.
VCPUS_PER_PROCESSOR = 4
PATIENCE_BEFORE_MESSAGE_S = 3.0
# In case a holder ends without an event, which should not happen.
LOOK_AGAIN_S = 5.0
FILE_PATTERN = re.compile(r"(share|boot|ticket)-(\d+)-(\d+)-(\d+)-(\d+)-(\d+)\.lock")

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Budget:
    """What all VMs of the machine may have at once: MiB of guest memory, and how many they may be (None: any number).

    `cpus`: processors of those that boot. `reserve_mb`: MiB that must stay free on the host while other VMs run.
    """

    memory_mb: int
    cpus: int
    max_vms: int | None = None
    reserve_mb: int = 0


def budget_of(memory_mb: int | None, max_vms: int | None) -> Budget:
    """Return the budget; without `memory_mb` nine tenths of what this process may have, and never the last tenth of it."""
    limit_mb = limits.memory_limit() >> 20
    default_mb = int(limit_mb * DEFAULT_PART)
    reserve_mb = limit_mb - default_mb if memory_mb is None else 0
    return Budget(memory_mb or default_mb, limits.processors() * VCPUS_PER_PROCESSOR, max_vms, reserve_mb)


@dataclass(frozen=True, slots=True)
class Share:
    """A VM's part of the budget, until `release`."""

    memory_mb: int
    _lock: HeldLock
    _boot: HeldLock | None

    def booted(self) -> None:
        """Give back the share that the VM had for booting."""
        if self._boot is not None:
            self._boot.release()

    def release(self) -> None:
        """Give it back; the removal of its file wakes those who wait."""
        try:
            self.booted()
        finally:
            self._lock.release()


def take_share(budget: Budget, memory_mb: int, cpus: int, lease: Lease, vm_name: str, tell: Callable[[str], None]) -> Share:
    """Block until the budget has room for a VM, and return its share; after a few seconds `tell` is told what is waited for.

    `cpus`: how many processors it boots with; 0 for one that does not boot. Raises MissingRequirementError at once for a VM
    that can never fit.
    """
    if memory_mb > budget.memory_mb:
        raise MissingRequirementError(
            f"VM {vm_name!r} wants {memory_mb} MiB, and all VMs together may have {budget.memory_mb} MiB: give it less, or raise "
            "--chvm-memory-budget-mb",
            vm_name=vm_name,
        )
    cpus = min(cpus, budget.cpus)
    ticket = _hold("ticket", memory_mb, cpus, lease)
    directory = common_lock_dir()
    try:
        if (share := _try_to_take(directory, budget, memory_mb, cpus, ticket, lease)) is not None:
            return share
        # Only now, since ending an inotify watch takes the kernel some time.
        with FileWatch(directory) as watch:
            tell_at = Deadline.after(PATIENCE_BEFORE_MESSAGE_S)
            told_of: set[int] | None = None
            while (share := _try_to_take(directory, budget, memory_mb, cpus, ticket, lease)) is None:
                stopped = _stopped(_held(directory))
                if tell_at.expired and (told_of is None or stopped - told_of):
                    told_of = stopped
                    boots = f" and {cpus} processor(s) to boot with" if cpus else ""
                    tell(f"VM {vm_name!r} waits for {memory_mb} MiB{boots}: {_in_words(directory, budget)}")
                _wait(directory, watch, Deadline.after(LOOK_AGAIN_S if tell_at.expired else max(0.01, tell_at.remaining_s)))
            return share
    finally:
        ticket.release()


def _hold(kind: str, memory_mb: int, cpus: int, lease: Lease) -> HeldLock:
    # Ordered by the monotonic clock; those who wait watch for the end of the process `pid`.
    return HeldLock(f"{kind}-{monotonic_ns():020}-{os.getpid()}-{next(_numbers)}-{memory_mb}-{cpus}.lock", lease)


def _try_to_take(directory: Path, budget: Budget, memory_mb: int, cpus: int, ticket: HeldLock, lease: Lease) -> Share | None:
    files = _held(directory)
    if _next_ticket(files) not in (ticket.name, None):
        return None
    if not _has_room(files, budget, boots=bool(cpus), memory_mb=memory_mb, cpus=cpus):
        return None
    # Nobody else has a VM: there is nobody to wait for.
    if _others(files) and budget.reserve_mb and memory_mb + budget.reserve_mb > limits.memory_available() >> 20:
        return None
    with ExitStack() as undo:
        share = _hold("share", memory_mb, 0, lease)
        undo.callback(share.release)
        boot = _hold("boot", 0, cpus, lease) if cpus else None
        if boot is not None:
            undo.callback(boot.release)
        if not _has_room(_held(directory), budget, boots=bool(cpus)):
            return None
        undo.pop_all()
    return Share(memory_mb, share, boot)


def _next_ticket(files: list[str]) -> str | None:
    """Return the oldest ticket of a process that can use it."""
    tickets = sorted(name for name in files if name.startswith("ticket"))
    return next((name for name in tickets if not _stopped([name])), None)


def _stopped(files: list[str]) -> set[int]:
    """Return which of the processes that hold these files are stopped."""
    pids = {int(match[3]) for name in files if (match := FILE_PATTERN.fullmatch(name))}
    return {pid for pid in pids - {os.getpid()} if is_stopped(pid)}


def _has_room(files: list[str], budget: Budget, *, boots: bool, memory_mb: int = 0, cpus: int = 0) -> bool:
    """Tell whether what is held, plus this much, is within the budget; processors count for VMs that boot."""
    memory, booting = _taken(files)
    memory += [memory_mb] if memory_mb else []
    few_enough = budget.max_vms is None or len(memory) <= budget.max_vms
    return few_enough and sum(memory) <= budget.memory_mb and (not boots or sum(booting) + cpus <= budget.cpus)


def _taken(files: list[str]) -> tuple[list[int], list[int]]:
    """Return the MiB of each VM that runs, and the processors of each that boots."""
    matches = [match for name in files if (match := FILE_PATTERN.fullmatch(name))]
    memory = [int(match[5]) for match in matches if match[1] == "share"]
    return memory, [int(match[6]) for match in matches if match[1] == "boot"]


def _others(files: list[str]) -> bool:
    """Tell whether another process has a VM."""
    matches = [match for name in files if (match := FILE_PATTERN.fullmatch(name))]
    return any(match[1] == "share" and int(match[3]) != os.getpid() for match in matches)


def _held(directory: Path) -> list[str]:
    """Return the names of shares and tickets that somebody holds; those of crashed processes are removed."""
    held = []
    for name in os.listdir(directory):
        if FILE_PATTERN.fullmatch(name):
            path = os.fspath(directory / name)
            remove_free_lock(path)
            # Another user's file cannot be removed; nobody holds it, so it does not count.
            try:
                if is_locked(path):
                    held.append(name)
            except PermissionError:
                held.append(name)
    return held


def _in_words(directory: Path, budget: Budget) -> str:
    files = _held(directory)
    memory, boots = _taken(files)
    most = f", at most {budget.max_vms} VMs" if budget.max_vms is not None else ""
    free = f", {limits.memory_available() >> 20} MiB are free on the host, less {budget.reserve_mb}" if budget.reserve_mb else ""
    return (
        f"{len(memory)} VMs have {sum(memory)} of {budget.memory_mb} MiB{most}{free}; {len(boots)} boot with {sum(boots)} of "
        f"{budget.cpus} processors; {sum(name.startswith('ticket') for name in files)} wait{_stopped_in_words(files)}"
    )


def _stopped_in_words(files: list[str]) -> str:
    pids = " ".join(map(str, sorted(_stopped(files))))
    return f"; stopped, as by Ctrl-Z, and not waited for where they wait: {pids} (go on with 'kill -CONT {pids}')" if pids else ""


def _wait(directory: Path, watch: FileWatch, deadline: Deadline) -> None:
    """Block until a file in the directory is removed, or a process that holds one ends."""
    pidfds = []
    try:
        for pid in {int(match[3]) for name in os.listdir(directory) if (match := FILE_PATTERN.fullmatch(name))} - {os.getpid()}:
            try:
                pidfds.append(open_pidfd(pid))
            except ProcessLookupError:
                # It ended since its file was seen: look again.
                return
        while ready := wait_readable([watch.fileno(), *pidfds], deadline):
            # Locks of subnets are in the same directory.
            if watch.fileno() not in ready or any(FILE_PATTERN.fullmatch(name) for name in watch.clear()):
                return
    finally:
        for pidfd in pidfds:
            os.close(pidfd)

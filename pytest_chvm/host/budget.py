"""How much of the machine all VMs of all runs may have at once, and waiting for one's turn.

Each VM that runs has a *share*: a file in the directory of locks common to all users, named after what it takes and locked by
the process that holds it, so that the kernel gives back the share of one that crashed. Who waits has a ticket, a file of
the same kind; the oldest ticket that is held goes first, so that a large VM is not passed for ever by small ones.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pytest_chvm.deadline import Deadline, wait_readable
from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.host import limits, records, remains
from pytest_chvm.host.directories import common_lock_dir
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.locks import HeldLock
from pytest_chvm.host.watch import FileWatch

# Of the memory that this process may have at all: the rest is for the host, and for what a VMM needs beside its guest.
DEFAULT_PART = 0.9
# Guests in tests wait more than they compute; with more than this each becomes so slow that its boot may time out. A VM
# that has more by itself runs alone.
VCPUS_PER_PROCESSOR = 4
PATIENCE_BEFORE_MESSAGE_S = 3.0
# Against a holder that ends without an event, which none should.
LOOK_AGAIN_S = 5.0
FILE_PATTERN = re.compile(r"(share|ticket)-(\d+)-(\d+)-(\d+)-(\d+)-(\d+)\.lock")

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Budget:
    """What all VMs of the machine may have at once: MiB of guest memory, processors, and how many they may be (None: any number).

    `reserve_mb`: MiB that must stay free on the host while other VMs run.
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

    def release(self) -> None:
        """Give it back; whoever waits is woken by its file's end."""
        self._lock.release()


def take_share(budget: Budget, memory_mb: int, cpus: int, lease: Lease, vm_name: str, tell: Callable[[str], None]) -> Share:
    """Block until the budget has room for a VM, and return its share; after a few seconds `tell` is told what is waited for.

    Raises InvalidConfigError at once for a VM that can never fit.
    """
    if memory_mb > budget.memory_mb:
        raise InvalidConfigError(
            f"VM {vm_name!r} wants {memory_mb} MiB, and all VMs together may have {budget.memory_mb} MiB: give it less, or raise "
            "--chvm-memory-budget-mb",
            vm_name=vm_name,
        )
    cpus = min(cpus, budget.cpus)
    ticket = _hold("ticket", memory_mb, cpus, lease)
    directory = common_lock_dir()
    try:
        with FileWatch(directory) as watch:
            tell_at = Deadline.after(PATIENCE_BEFORE_MESSAGE_S)
            told = False
            while (share := _try_to_take(directory, budget, memory_mb, cpus, ticket, lease)) is None:
                if tell_at.expired and not told:
                    told = True
                    tell(f"VM {vm_name!r} waits for {memory_mb} MiB and {cpus} processor(s): {_in_words(directory, budget)}")
                _wait(directory, watch, Deadline.after(LOOK_AGAIN_S if told else max(0.01, tell_at.remaining_s)))
            return share
    finally:
        ticket.release()


def _hold(kind: str, memory_mb: int, cpus: int, lease: Lease) -> HeldLock:
    # Ordered by the clock that no one sets; the pid is whose end is waited for.
    return HeldLock(f"{kind}-{time.monotonic_ns():020}-{os.getpid()}-{next(_numbers)}-{memory_mb}-{cpus}.lock", lease)


def _try_to_take(directory: Path, budget: Budget, memory_mb: int, cpus: int, ticket: HeldLock, lease: Lease) -> Share | None:
    gate = HeldLock("budget.lock", lease)
    try:
        files = _held(directory)
        if min(name for name in files if name.startswith("ticket")) != ticket.name:
            return None
        shares = _shares(files)
        if sum(share[0] for share in shares) + memory_mb > budget.memory_mb:
            return None
        if sum(share[1] for share in shares) + cpus > budget.cpus or (budget.max_vms is not None and len(shares) >= budget.max_vms):
            return None
        # Where no VM runs there is nobody to wait for.
        if shares and budget.reserve_mb and memory_mb + budget.reserve_mb > limits.memory_available() >> 20:
            return None
        return Share(memory_mb, _hold("share", memory_mb, cpus, lease))
    finally:
        gate.release()


def _shares(files: list[str]) -> list[tuple[int, int]]:
    """Return MiB and processors of each share."""
    matches = [match for name in files if (match := FILE_PATTERN.fullmatch(name))]
    return [(int(match[5]), int(match[6])) for match in matches if match[1] == "share"]


def _held(directory: Path) -> list[str]:
    """Return the names of shares and tickets that somebody holds; those of crashed processes are removed."""
    held = []
    for name in os.listdir(directory):
        if FILE_PATTERN.fullmatch(name):
            path = os.fspath(directory / name)
            remains.remove_free_lock(path)
            # Another user's cannot be removed, and does not count for that.
            try:
                if records.is_locked(path):
                    held.append(name)
            except PermissionError:
                held.append(name)
    return held


def _in_words(directory: Path, budget: Budget) -> str:
    files = _held(directory)
    shares = _shares(files)
    most = f", at most {budget.max_vms} VMs" if budget.max_vms is not None else ""
    free = f", {limits.memory_available() >> 20} MiB are free on the host, less {budget.reserve_mb}" if budget.reserve_mb else ""
    return (
        f"{len(shares)} VMs have {sum(share[0] for share in shares)} of {budget.memory_mb} MiB and "
        f"{sum(share[1] for share in shares)} of {budget.cpus} processors{most}{free}; {len(files) - len(shares)} wait"
    )


def _wait(directory: Path, watch: FileWatch, deadline: Deadline) -> None:
    """Block until a file of the directory's goes, or a process that holds one ends."""
    pidfds = []
    try:
        for pid in {int(match[3]) for name in os.listdir(directory) if (match := FILE_PATTERN.fullmatch(name))} - {os.getpid()}:
            try:
                pidfds.append(os.pidfd_open(pid))
            except ProcessLookupError:
                # It ended after the look: look again.
                return
        while ready := wait_readable([watch.fileno(), *pidfds], deadline):
            # Looking itself takes and gives back a lock of the directory's, which is no news.
            if watch.fileno() not in ready or any(FILE_PATTERN.fullmatch(name) for name in watch.clear()):
                return
    finally:
        for pidfd in pidfds:
            os.close(pidfd)

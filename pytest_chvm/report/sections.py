"""The logs and events of a test's VMs: as sections of its report, cleaned and bounded, and as files that are kept."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pytest_chvm.base.text import last_lines
from pytest_chvm.drivers.memory import copy_data
from pytest_chvm.machine.events import Event
from pytest_chvm.report.history import how_it_started, last_events

CONSOLE_LINES = 60
VMM_LINES = 20
EVENTS = 12
# With what is added, a directory name has at most 255 bytes.
LONGEST_NAME = 150


@dataclass(frozen=True, slots=True)
class VmRecord:
    """What is remembered of a VM after it is gone."""

    name: str
    serial_log: Path
    vmm_log: Path
    event_log: Path
    events: tuple[Event, ...]
    # What its kernel said when it gave up.
    panic: str | None = None
    # What attaches a debugger to it.
    gdb: str | None = None


def sections_of(records: Iterable[VmRecord]) -> Iterator[tuple[str, str]]:
    """Yield title and text of the sections of a report: of each VM its kernel's panic, its console, the last events, the VMM's log.

    What is empty is left out.
    """
    for record in records:
        if record.gdb:
            yield f"gdb of VM {record.name}", record.gdb
        if record.panic:
            yield f"kernel panic of VM {record.name}", record.panic
        yield (
            ", ".join([f"console of VM {record.name}", *how_it_started(record.events)]),
            last_lines(record.serial_log, CONSOLE_LINES) or f"(nothing in {record.serial_log})",
        )
        if record.events:
            yield f"events of VM {record.name}", last_events(record.events, EVENTS)
        said = last_lines(record.vmm_log, VMM_LINES)
        if said:
            yield f"VMM log of VM {record.name}", said


def directory_of(node_id: str, worker: str, attempt: int) -> str:
    """Return the name of the directory for the logs of one attempt at a test: no other attempt, test or xdist worker has it."""
    # As people write it down: test_x.py-test_name-parameter.
    plain = node_id.replace("::", "-").replace("/", "-").replace("[", "-").removesuffix("]")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", plain)[:LONGEST_NAME].strip("-.")
    if name != plain:
        # Shortened names of other tests may be the same.
        name += f"-{hashlib.sha256(node_id.encode(errors='surrogateescape')).hexdigest()[:8]}"
    return name + (f"-{worker}" if worker != "main" else "") + (f"-attempt-{attempt}" if attempt > 1 else "")


def keep_logs(records: Iterable[VmRecord], place: Path) -> list[Path]:
    """Copy the logs of a test's VMs to a directory; returns the copies. Of two of one name the second one's has a number in front.

    Raises OSError where they cannot be written.
    """
    copies: list[Path] = []
    seen: Counter[str] = Counter()
    for record in records:
        seen[record.serial_log.name] += 1
        number = seen[record.serial_log.name]
        for log in (record.serial_log, record.vmm_log, record.event_log):
            if log.exists():
                place.mkdir(parents=True, exist_ok=True)
                copy = place / f"{f'{number}-' if number > 1 else ''}{log.name}"
                copy_data(log, copy)
                copies.append(copy)
    return copies

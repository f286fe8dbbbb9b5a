"""The logs of a test's VMs: as sections of its report, and as files that are kept. All of it is cleaned and bounded."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pytest_chvm.text import last_lines

CONSOLE_LINES = 60
VMM_LINES = 20


@dataclass(frozen=True, slots=True)
class VmRecord:
    """What is remembered of a VM after it is gone."""

    name: str
    serial_log: Path
    vmm_log: Path
    origin: str


def sections_of(records: Iterable[VmRecord]) -> Iterator[tuple[str, str]]:
    """Yield title and text of the report sections for VMs: the console, and the VMM's log where it has anything."""
    for record in records:
        yield (
            f"console of VM {record.name}, {record.origin}",
            last_lines(record.serial_log, CONSOLE_LINES) or f"(nothing in {record.serial_log})",
        )
        said = last_lines(record.vmm_log, VMM_LINES)
        if said:
            yield f"VMM log of VM {record.name}", said


def keep_logs(records: Iterable[VmRecord], node_id: str, artifacts: Path) -> list[Path]:
    """Copy the logs of a test's VMs to a directory named after it below `artifacts`; returns the copies."""
    place = artifacts / re.sub(r"[^A-Za-z0-9_.-]+", "-", node_id).strip("-.")[:150]
    copies = []
    for record in records:
        for log in (record.serial_log, record.vmm_log):
            if log.exists():
                place.mkdir(parents=True, exist_ok=True)
                copies.append(Path(shutil.copyfile(log, place / log.name)))
    return copies

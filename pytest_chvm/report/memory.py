"""The memory of a failed test's VMs, kept among its artifacts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_chvm.errors import VmError

if TYPE_CHECKING:
    from pytest_chvm.machine.vm import Vm


def keep_memory(vms: Iterable[Vm], place: Path) -> list[tuple[str, str]]:
    """Write the memory of each VM that is still there to a directory; returns title and text of a report's sections."""
    sections = []
    for vm in vms:
        core = place / f"{vm.name}.core"
        # Of the phase that failed first.
        if vm.closed or vm.machine.ended or core.exists():
            continue
        try:
            place.mkdir(parents=True, exist_ok=True)
            said = str(vm.dump_memory(core))
        except (VmError, OSError) as error:
            said = f"it cannot be kept: {error}"
        sections.append((f"memory of VM {vm.name}", said))
    return sections

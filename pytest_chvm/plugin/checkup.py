"""The check of a test's VMs at its end: what happened to them after the test's last call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pytest_chvm.errors import VmError

if TYPE_CHECKING:
    from pytest_chvm.plugin.factory import VmFactory


def check_up(factories: Iterable[VmFactory]) -> VmError | None:
    """Return the error that a test has to fail with, further ones as its notes; None where all running VMs are well."""
    vms = [vm for factory in factories if not factory.closed for vm in list(factory.vms)]
    found = [trouble for vm in vms if (trouble := vm.machine.check_up()) is not None]
    if not found:
        return None
    first, *others = found
    for other in others:
        first.add_note(f"And {type(other).__name__}: {other}")
    first.add_note("Seen at the end of the test, after its last call. See vm.expect_panic() where it is meant to be.")
    # The traceback of this check would tell the user nothing.
    return first.with_traceback(None)

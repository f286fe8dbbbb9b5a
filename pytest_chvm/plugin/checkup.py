"""What has befallen a test's VMs by its end that no call of the test's was there to see."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pytest_chvm.errors import VmError

if TYPE_CHECKING:
    from pytest_chvm.plugin.factory import VmFactory


def check_up(factories: Iterable[VmFactory]) -> VmError | None:
    """Return what a test has to fail for, with all else as notes; None where all VMs that live are well."""
    vms = [vm for factory in factories if not factory.closed for vm in list(factory.vms)]
    found = [trouble for vm in vms if (trouble := vm.check_up()) is not None]
    if not found:
        return None
    first, *others = found
    for other in others:
        first.add_note(f"And {type(other).__name__}: {other}")
    first.add_note("Seen at the end of the test, after its last call. See vm.expect_panic() where it is meant to be.")
    # How it was found out is nothing to the test.
    return first.with_traceback(None)

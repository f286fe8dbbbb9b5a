"""The check of a test's VMs at its end: what happened to them after the test's last call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_chvm.errors import VmError
from pytest_chvm.plugin.keys import factories_key
from pytest_chvm.plugin.splats import splats_of

if TYPE_CHECKING:
    from pytest_chvm.plugin.factory import VmFactory


def check_up(item: pytest.Item) -> VmError | None:
    """Return the error that a test has to fail with, further ones as its notes; None where all running VMs are well."""
    factories: list[VmFactory] = item.config.stash[factories_key]
    vms = [vm for factory in factories if not factory.closed for vm in list(factory.vms)]
    found = [trouble for vm in vms if (trouble := vm.machine.check_up()) is not None]
    found += splats_of(item)
    if not found:
        return None
    first, *others = found
    for other in others:
        first.add_note(f"And {type(other).__name__}: {other}")
    first.add_note("Seen at the end of the test, after its last call. See vm.expect_panic() where it is meant to be.")
    # The traceback of this check would tell the user nothing.
    return first.with_traceback(None)

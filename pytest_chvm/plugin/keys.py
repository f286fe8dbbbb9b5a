"""What a configuration and an item remember, and names that several rooms of the plugin use."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from pytest_chvm.settings import Settings

if TYPE_CHECKING:
    from pytest_chvm.host.host import Host
    from pytest_chvm.plugin.sigterm import OrderlyEnd
    from pytest_chvm.plugin.xdist import Controller

VM_FIXTURES = {"chvm_vm", "chvm_vm_factory", "chvm_network"}
# The options that name tests of the kernel's own.
KSELFTEST, KUNIT = "chvm_kselftest", "chvm_kunit"
DEFAULT_ARTIFACTS = "chvm-artifacts"

settings_key = pytest.StashKey[Settings]()
kernel_ids_key = pytest.StashKey[list[str]]()
factories_key = pytest.StashKey[list[Any]]()
failed_key = pytest.StashKey[bool]()
item_key = pytest.StashKey[pytest.Item]()
summed_up_key = pytest.StashKey[bool]()
failures_key = pytest.StashKey[list[str]]()
# What the kernels of a test's VMs have reported in the phase that runs, a line each.
splats_key = pytest.StashKey[list[str]]()
attempt_key = pytest.StashKey[int]()
making_key = pytest.StashKey[list[pytest.FixtureRequest]]()
teardown_key = pytest.StashKey[ExitStack]()
in_guest_key = pytest.StashKey[bool]()
pid_key = pytest.StashKey[int]()
run_key = pytest.StashKey[str]()
host_key: pytest.StashKey[Host] = pytest.StashKey()
controller_key: pytest.StashKey[Controller] = pytest.StashKey()
sigterm_key: pytest.StashKey[OrderlyEnd] = pytest.StashKey()

"""The same behaviour of both VMMs: each test runs once with QEMU and once with Cloud Hypervisor.

Where there is no KVM, the Cloud Hypervisor half of a file runs in the lab; see `tests/relay.py`.
"""

import functools

import pytest

from pytest_chvm import MissingRequirementError, Settings
from pytest_chvm.base.progress import show_progress
from pytest_chvm.guest.builders.debian import DebianRecipe, build_debian
from pytest_chvm.machine.guest_choice import cache_dir
from tests.conftest import kept
from tests.relay import CLOUD_HYPERVISOR, require_binary


@pytest.fixture(params=["qemu", CLOUD_HYPERVISOR], scope="module")
def vmm(request):
    """The VMM of this run of the test."""
    if request.param == CLOUD_HYPERVISOR:
        require_binary()
    return request.param


@pytest.fixture
def boot(chvm_vm, vmm):
    """`chvm_vm` with the VMM of this run."""
    return functools.partial(chvm_vm, vmm=vmm)


@pytest.fixture(scope="session")
def debian_image():
    """The stock image of these tests, Debian with cloud-init and an SSH server: built once and kept, as `chvm guest build` does."""
    try:
        return build_debian(DebianRecipe(), cache_dir(Settings.resolve()), show_progress)
    except MissingRequirementError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def vm(chvm_vm_factory, vmm):
    """A VM that the tests of a module share, and leave as it was."""
    with chvm_vm_factory(vmm=vmm, name=f"shared-{vmm}") as machine:
        yield machine


@pytest.fixture(autouse=True)
def nothing_left():
    """Every test here must leave the host as it was, failed boots included."""

    def lasting():
        # A VM that the tests of a module share keeps its connection to the console.
        return {thing for thing in kept() if not thing.startswith("descriptor")}

    before = lasting()
    yield
    assert lasting() <= before

"""The same behaviour of both VMMs: each test runs once with QEMU and once with Cloud Hypervisor.

Where there is no KVM, the Cloud Hypervisor half of a file runs in the lab; see `relay.py`.
"""

import functools
import os

import pytest

from pytest_chvm import InvalidConfigError
from pytest_chvm.drivers.cloud_hypervisor import CloudHypervisorDriver
from pytest_chvm.host.kvm import why_no_kvm
from tests.behaviour.relay import is_inside, run_in_lab

CLOUD_HYPERVISOR = "cloud-hypervisor"
_results_key = pytest.StashKey[dict]()


def pytest_configure(config):
    config.addinivalue_line("markers", "in_lab: needs of the host what the lab has, with either VMM")


@pytest.fixture(params=["qemu", CLOUD_HYPERVISOR], scope="module")
def vmm(request):
    """The VMM of this run of the test."""
    if request.param == CLOUD_HYPERVISOR and (reason := why_no_binary()):
        if os.environ.get("CHVM_REQUIRE_CLOUD_HYPERVISOR"):
            pytest.fail(f"CHVM_REQUIRE_CLOUD_HYPERVISOR is set, and {reason}")
        pytest.skip(f"not run with the real Cloud Hypervisor: {reason}")
    return request.param


@pytest.fixture
def boot(chvm_vm, vmm):
    """`chvm_vm` with the VMM of this run."""
    return functools.partial(chvm_vm, vmm=vmm)


@pytest.fixture(scope="module")
def vm(chvm_vm_factory, vmm):
    """A VM that the tests of a module share, and leave as it was."""
    with chvm_vm_factory(vmm=vmm, name=f"shared-{vmm}") as machine:
        yield machine


@functools.cache
def why_no_binary():
    try:
        CloudHypervisorDriver().binary()
    except InvalidConfigError as error:
        return str(error)
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    """Report what the lab's run of this test reported, where it is one for the lab."""
    if not _is_for_lab(item):
        return None
    results = item.config.stash.setdefault(_results_key, {})
    if item.path not in results:
        here = [other.nodeid for other in item.session.items if other.path == item.path and _is_for_lab(other)]
        directory = item.config._tmp_path_factory.mktemp(f"lab-{item.path.stem}")
        results[item.path] = run_in_lab(item.config, directory, here)
    reports, said = results[item.path]
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports.get(item.nodeid) or [_missing(item, said)]:
        item.ihook.pytest_runtest_logreport(report=report)
    # The test before kept what this one could have shared with it; it is this one's to take down.
    item.session._setupstate.teardown_exact(nextitem)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _is_for_lab(item):
    callspec = getattr(item, "callspec", None)
    vmm = callspec.params.get("vmm") if callspec is not None else None
    if vmm == CLOUD_HYPERVISOR and why_no_binary():
        return False
    wants = vmm == CLOUD_HYPERVISOR or item.get_closest_marker("in_lab") is not None
    return wants and not is_inside() and why_no_kvm() is not None


def _missing(item, said):
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords={},
        outcome="failed",
        longrepr=f"the lab's run has no report of this test; {said}",
        when="call",
    )

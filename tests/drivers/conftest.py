"""The drivers as tests use them: with stand-ins and with real VMMs."""

import pytest

from pytest_chvm import CloudHypervisorDriver, QemuDriver, VmConfig, VmError
from tests.relay import CLOUD_HYPERVISOR, require_binary


@pytest.fixture(autouse=True)
def nothing_left_of_any(nothing_left):
    """Every test here must leave the host as it was."""


class Booted:
    """One driver as tests use it: `boot(**config)` starts a VM that does nothing and is ended after the test."""

    def __init__(self, driver, defaults):
        self.driver = driver
        self.defaults = defaults
        self.handles = []

    def config(self, **config):
        return VmConfig(**{"networks": [], **self.defaults, **config})

    def boot(self, **config):
        handle = self.driver.boot(self.config(**config))
        self.handles.append(handle)
        return handle

    def end(self):
        for handle in self.handles:
            try:
                self.driver.kill(handle)
            except VmError:
                # The test ended it, or made it another's.
                continue


@pytest.fixture
def ch(stand_in_ch, fake_kernel, tmp_path):
    """Cloud Hypervisor's driver with the stand-in for its executable."""
    booted = Booted(CloudHypervisorDriver(), {"kernel": fake_kernel, "serial_log": tmp_path / "serial.log"})
    yield booted
    booted.end()


@pytest.fixture
def qemu(guest, tmp_path):
    """QEMU's driver, with real QEMU. The guest is not waited for."""
    booted = Booted(QemuDriver(), {"kernel": guest.kernel, "initramfs": guest.initramfs, "serial_log": tmp_path / "serial.log"})
    yield booted
    booted.end()


@pytest.fixture
def real_ch(guest, tmp_path):
    """Cloud Hypervisor's driver, with the real one. The guest is not waited for."""
    require_binary()
    booted = Booted(
        CloudHypervisorDriver(), {"kernel": guest.kernel, "initramfs": guest.initramfs, "serial_log": tmp_path / "serial.log"}
    )
    yield booted
    booted.end()


@pytest.fixture(params=["stand-in", "qemu", CLOUD_HYPERVISOR])
def vmm(request):
    """The drivers: Cloud Hypervisor's with the stand-in, QEMU's, and Cloud Hypervisor's with the real one (see `tests/relay.py`)."""
    return request.getfixturevalue({"stand-in": "ch", "qemu": "qemu", CLOUD_HYPERVISOR: "real_ch"}[request.param])

"""Every test here must leave the host as it was."""

import os
import re

import pytest

from pytest_chvm import CloudHypervisorDriver, QemuDriver, VmConfig, VmError
from pytest_chvm.host.networks import interface_exists
from pytest_chvm.host.processes import keeper
from pytest_chvm.host.remains import start_time_ticks


def kept():
    """What this process's keeper has: its children, its leases, and the locks and sockets held here."""
    mine = keeper()
    pid = mine._process.pid
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        # One that is a zombie has ended, and is about to be reaped.
        children = {f"process {child}" for child in file.read().split() if start_time_ticks(int(child)) is not None}
    leases = {f"lease {path}" for path in mine.directory.iterdir() if path.is_dir()}
    descriptors = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        # The rest is pytest's, and files that a garbage collection closes.
        if re.search(r"pytest-chvm|/dev/net/tun|inotify|pidfd|socket:", target):
            descriptors.add(f"descriptor {fd}: {target}")
    return children | leases | descriptors


@pytest.fixture(autouse=True)
def nothing_left():
    """Fails a test after which a process, lease, lock, socket or watch is there that was not before."""
    before = kept()
    yield
    left = kept() - before
    assert not left, f"left behind: {sorted(left)}"


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


@pytest.fixture(params=["cloud-hypervisor", "qemu"])
def vmm(request):
    """Both drivers, one after the other."""
    return request.getfixturevalue({"cloud-hypervisor": "ch", "qemu": "qemu"}[request.param])


@pytest.fixture
def link_exists():
    return lambda name: interface_exists(name, None)

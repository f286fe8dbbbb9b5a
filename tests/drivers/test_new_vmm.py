"""A VMM that only boots: the least that a driver is."""

import sys
import types
from pathlib import Path

import pytest

from pytest_chvm import UnsupportedError, VmConfig, VmState
from pytest_chvm.drivers import DRIVERS, make_driver
from pytest_chvm.drivers.base import Abilities, VmDriver
from pytest_chvm.drivers.boot import DEFAULT_OPTIONS, VmmCommand
from pytest_chvm.drivers.process import VmmProcess
from pytest_chvm.host.binaries import Binary
from pytest_chvm.host.host import default_host

PROGRAM = "import sys, time; open(sys.argv[1], 'a').write('CHVM_READY 127.0.0.1\\n'); time.sleep(600)"


class TinyDriver(VmDriver):
    vmm = "tiny"
    abilities = Abilities()

    def __init__(self, *, accel="auto", binary=None, virtiofsd=None, host=None):
        self._process = VmmProcess(self, ("tiny-vmm",), virtiofsd, host or default_host())

    def why_not(self):
        return None

    def binary(self):
        return Binary(Path(sys.executable), "tiny 1")

    def boot(self, config, options=DEFAULT_OPTIONS):
        return self._process.boot(config, self._command, options)

    def _command(self, boot):
        argv = [sys.executable, "-c", PROGRAM, str(boot.serial_log), "tiny-vmm"]
        return VmmCommand(argv, [], boot.lease.directory / "events.json")

    def stop(self, handle):
        self._process.stop(handle)

    def kill(self, handle):
        self._process.kill(handle)

    def state(self, handle):
        return self._process.state(handle)


@pytest.fixture
def tiny(monkeypatch, fake_kernel, tmp_path):
    """A config for a driver that was registered as any is: by one line."""
    module = types.ModuleType("tiny_vmm_driver")
    module.TinyDriver = TinyDriver
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(DRIVERS, "tiny", (module.__name__, "TinyDriver"))
    return {"kernel": fake_kernel, "networks": [], "serial_log": tmp_path / "serial.log"}


def test_a_vmm_that_only_boots_is_refused_what_it_lacks_by_name(tiny):
    driver = make_driver("tiny")
    handle = driver.boot(VmConfig(name="least", **tiny))
    try:
        for ask in (driver.pause, driver.resume, lambda of: driver.snapshot(of, Path("/nowhere"))):
            with pytest.raises(UnsupportedError, match="'least': tiny cannot"):
                ask(handle)
        with pytest.raises(UnsupportedError, match="tiny cannot give a guest virtio-serial ports"):
            driver.boot(VmConfig(name="other", channels=["one"], **tiny))
    finally:
        driver.stop(handle)
    assert driver.state(handle).state is VmState.STOPPED

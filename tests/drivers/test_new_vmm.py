"""A VMM that only boots: the least that a driver is."""

import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_chvm import Settings, UnsupportedError, VmConfig, VmState, drivers, launch
from pytest_chvm.drivers import make_driver
from pytest_chvm.drivers.base import Abilities, VmDriver
from pytest_chvm.drivers.boot import DEFAULT_OPTIONS, VmmCommand
from pytest_chvm.drivers.preflight import preflight
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
    """A config for a driver that was registered as any is: by its name and its folder."""
    module = types.ModuleType("pytest_chvm.drivers.tiny.driver")
    module.DRIVER = TinyDriver
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(drivers, "VMMS", [*drivers.VMMS, "tiny"])
    return {"kernel": fake_kernel, "networks": [], "serial_log": tmp_path / "serial.log"}


def test_each_vmm_that_can_be_asked_for_has_a_driver_of_its_name():
    assert [make_driver(name).vmm for name in drivers.VMMS] == drivers.VMMS


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


def test_a_vm_of_it_is_launched_and_the_host_is_looked_at_once(tiny, tmp_path, monkeypatch):
    asked = []

    def counted(config):
        asked.append(config.name)
        preflight(config)

    for module in ("machine.guest_choice", "machine.launcher", "drivers.process"):
        monkeypatch.setattr(f"pytest_chvm.{module}.preflight", counted)
    initramfs = tmp_path / "initramfs"
    initramfs.touch()
    settings = replace(Settings.resolve({}, {}, {}), vmm="tiny", cache_dir=tmp_path / "cache")
    with launch(name="least", settings=settings, initramfs=initramfs, **tiny) as vm:
        assert vm.ip == "127.0.0.1"
        assert vm.origin.in_words == "booted: tiny cannot save a VM, or start a saved one"
    assert asked == ["least"]

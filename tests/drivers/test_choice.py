"""Which VMM and accelerator "auto" means: never a KVM that does not run guests."""

import os

import pytest

from pytest_chvm import CloudHypervisorDriver, InvalidConfigError, QemuDriver
from pytest_chvm.drivers import choose_vmm, make_driver
from pytest_chvm.drivers.cloud_hypervisor import driver as cloud_hypervisor
from pytest_chvm.drivers.qemu import driver as qemu
from pytest_chvm.host import kvm


@pytest.fixture
def kvm_is(monkeypatch):
    def say(reason):
        for module in (cloud_hypervisor, qemu):
            monkeypatch.setattr(module, "why_no_kvm", lambda: reason)

    return say


def test_cloud_hypervisor_where_it_and_kvm_are(stand_in_ch, kvm_is):
    kvm_is(None)
    assert choose_vmm()[0] == "cloud-hypervisor"


def test_qemu_where_kvm_runs_no_guests_and_it_says_why(stand_in_ch, kvm_is):
    kvm_is("/dev/kvm opens, but that is all")
    vmm, why = choose_vmm()
    assert vmm == "qemu"
    assert "no usable KVM: /dev/kvm opens, but that is all" in why


def test_qemu_where_cloud_hypervisor_is_broken_and_it_says_why(stand_in_ch, kvm_is):
    kvm_is(None)
    stand_in_ch.does(version_status=1)
    stand_in_ch.path.touch()
    vmm, why = choose_vmm()
    assert vmm == "qemu"
    assert "does not work" in why


def test_named_vmm_is_started_whatever_the_machine_looks_like(ch, stand_in_ch, kvm_is):
    kvm_is("/dev/kvm is not there")
    handle = ch.boot()
    assert stand_in_ch.record(handle.process.pid)


def accelerator_of(handle):
    return handle.command[handle.command.index("-accel") + 1]


def test_qemu_runs_in_software_where_kvm_runs_no_guests(qemu, kvm_is):
    kvm_is("there is none")
    assert accelerator_of(qemu.boot()) == "tcg"


def test_accelerator_that_is_named_is_used(qemu, kvm_is):
    kvm_is(None)
    qemu.driver = QemuDriver(accel="tcg")
    assert accelerator_of(qemu.boot()) == "tcg"
    kvm_is("there is none")
    qemu.driver = QemuDriver(accel="kvm")
    assert accelerator_of(qemu.boot(name="other")) == "kvm"


@pytest.mark.parametrize(
    ("there", "opens", "flags", "reason"),
    [
        (False, False, "fpu svm", "/dev/kvm is not there"),
        (True, False, "fpu svm", "may not be opened by you: join the group kvm"),
        (True, True, "fpu sse2 hypervisor", "opens, but the CPU has neither vmx nor svm"),
        (True, True, "fpu svmx_like", "neither vmx nor svm"),
        (True, True, "fpu svm", None),
        (True, True, "fpu vmx", None),
    ],
)
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the flags are x86's")
def test_kvm_that_opens_is_not_yet_kvm_that_runs_guests(monkeypatch, tmp_path, there, opens, flags, reason):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags\t\t: {flags}\n\nprocessor : 1\nflags\t\t: {flags}\n")
    monkeypatch.setattr(kvm, "Path", lambda path: cpuinfo if path == "/proc/cpuinfo" else None)
    monkeypatch.setattr(kvm.os.path, "exists", lambda path: there)
    monkeypatch.setattr(kvm.os, "access", lambda path, mode: opens)
    found = kvm.why_no_kvm.__wrapped__()
    monkeypatch.undo()
    assert (found is None) if reason is None else (reason in found)


def test_vmm_that_there_is_not():
    with pytest.raises(InvalidConfigError, match="vmm='xen': expected one of auto, cloud-hypervisor, qemu"):
        make_driver("xen")


def test_cloud_hypervisor_has_no_software():
    with pytest.raises(InvalidConfigError, match="has KVM only; use --chvm-vmm=qemu for software"):
        CloudHypervisorDriver(accel="tcg")

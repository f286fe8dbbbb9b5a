"""Programs of other versions and kinds than ours: what they lack is worked around, or said before anything is started."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_chvm import InvalidConfigError, MissingRequirementError, QemuDriver, Settings, SharedDir, launch
from pytest_chvm.drivers import choose_vmm
from pytest_chvm.host.binaries import Binary
from pytest_chvm.host.versions import Feature, lacks, program_of, version_of
from pytest_chvm.host.virtiofsd import PLACES, Virtiofsd, find_virtiofsd
from pytest_chvm.machine.plan import driver_for

# The real one, as it was before it knew --readonly.
OLD_VIRTIOFSD = """#!/bin/sh
case " $* " in
*" --version "*) echo "virtiofsd 1.10.1"; exit ;;
*" --readonly "*) echo "error: unexpected argument '--readonly' found"; exit 2 ;;
esac
exec {real} "$@"
"""


def program(path, version):
    path.write_text(f"#!{sys.executable}\nprint({version!r})\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def old_virtiofsd(tmp_path):
    places = [os.environ.get("CHVM_VIRTIOFSD"), shutil.which("virtiofsd"), *(os.path.join(place, "virtiofsd") for place in PLACES)]
    for place in places:
        if place and os.access(place, os.X_OK) and find_virtiofsd(Path(place)).is_rust:
            script = tmp_path / "virtiofsd"
            script.write_text(OLD_VIRTIOFSD.format(real=place))
            script.chmod(0o755)
            return script
    pytest.skip("the Rust virtiofsd is not installed")


@pytest.mark.parametrize("boot", ["cold", "clone"])
def test_a_virtiofsd_that_has_no_readonly_serves_read_only_all_the_same(old_virtiofsd, needs_root, tmp_path, boot):
    directory = tmp_path / "a, b"
    (directory / "below").mkdir(parents=True)
    (directory / "file").write_text("from the host")
    settings = replace(Settings.resolve(), virtiofsd=old_virtiofsd)
    shares = [SharedDir("ro", directory, read_only=True), SharedDir("rw", directory)]
    with launch(vmm="qemu", network="none", settings=settings, boot=boot, shared_dirs=shares) as vm:
        assert vm.check_output("cat /mnt/ro/file") == "from the host"
        # The guest may mount as it likes: that it is read-only is the host's doing.
        vm.check_output("umount /mnt/ro; mkdir /tmp/again; mount -t virtiofs ro /tmp/again")
        assert "Read-only" in vm.run("touch /tmp/again/new /tmp/again/below/new").stderr
        vm.check_output("touch /mnt/rw/new")
    assert sorted(os.listdir(directory)) == ["below", "file", "new"]
    assert os.listdir(directory / "below") == []


@pytest.fixture
def stand_in_unshare(tmp_path_factory, monkeypatch):
    """Have unshare(1) do what a line of the shell says."""

    def install(line):
        program = tmp_path_factory.mktemp("bin") / "unshare"
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return install


def test_a_read_only_share_that_cannot_be_is_said_before_anything_is_started(old_virtiofsd, tmp_path, stand_in_unshare):
    stand_in_unshare("echo 'unshare: Operation not permitted' >&2; exit 1")
    settings = replace(Settings.resolve(), virtiofsd=old_virtiofsd)
    shares = [SharedDir("ro", tmp_path, read_only=True)]
    with pytest.raises(MissingRequirementError, match=r"no --readonly \(the Rust one has it since 1.13\).*not permitted"):
        launch(vmm="qemu", network="none", settings=settings, shared_dirs=shares)


def test_a_user_has_a_mount_namespace_in_a_user_namespace_of_theirs(monkeypatch, stand_in_unshare):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    stand_in_unshare("exit 0")
    words = Virtiofsd(Path("/v"), is_rust=True, has_readonly=False).command(SharedDir("t", "/d", read_only=True), Path("/run/s"))
    assert words[:6] == ["unshare", "--user", "--map-root-user", "--mount", "--propagation", "private"]
    assert "--shared-dir=/run/s.mount/tree" in words
    assert "--readonly" not in words


@pytest.mark.parametrize(
    ("line", "program", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)", "qemu", (7, 2)),
        ("QEMU emulator version 10.0.2", "qemu", (10, 0)),
        ("cloud-hypervisor v53.0.0", "cloud-hypervisor", (53, 0)),
        ("cloud-hypervisor v52.0-12-gdeadbeef", "cloud-hypervisor", (52, 0)),
        ("virtiofsd 1.10.0", "virtiofsd", (1, 10)),
        ("virtiofsd backend 1.10.0", "virtiofsd", (1, 10)),
        ("virtiofsd version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", "virtiofsd (C)", (7, 2)),
        ("using FUSE kernel interface version 7.36", "virtiofsd (C)", (7, 36)),
        ("something else", None, None),
        ("", None, None),
    ],
)
def test_what_programs_say_of_themselves(line, program, version):
    binary = Binary(Path("/bin/x"), line)
    assert (program_of(binary), version_of(binary)) == (program, version)


def test_a_version_is_compared_as_numbers_and_one_that_is_not_said_is_new():
    def old(version):
        return lacks(Binary(Path("/bin/x"), version), Feature.READ_ONLY_SHARES)

    assert [old(f"virtiofsd {version}") for version in ("1.9.0", "1.10.1", "1.12.0", "1.13.0", "1.14.0", "2.0.0", "")] == [
        True, True, True, False, False, False, False,
    ]  # fmt: skip


def test_a_qemu_that_is_too_old_is_said(tmp_path):
    old = program(tmp_path / "qemu", "QEMU emulator version 5.2.0 (Debian 1:5.2+dfsg-11+deb11u3)")
    with pytest.raises(MissingRequirementError, match=r"5.2.0.*qemu v6.0 or newer is needed"):
        QemuDriver(binary=old).binary()


def settings(**more):
    return replace(Settings.resolve({}, {}, {}), **more)


def test_software_alone_means_qemu(stand_in_ch, monkeypatch):
    for module in ("cloud_hypervisor", "qemu"):
        monkeypatch.setattr(f"pytest_chvm.drivers.{module}.driver.why_no_kvm", lambda: None)
    vmm, why = choose_vmm(accel="tcg")
    assert vmm == "qemu"
    assert "Cloud Hypervisor has KVM only" in why
    assert driver_for(settings(accel="tcg")).vmm == "qemu"


def test_a_vmm_that_is_named_by_its_path_is_that_one_whatever_its_name(stand_in_ch, tmp_path, monkeypatch):
    for module in ("cloud_hypervisor", "qemu"):
        monkeypatch.setattr(f"pytest_chvm.drivers.{module}.driver.why_no_kvm", lambda: None)
    qemu = program(tmp_path / "vmm", "QEMU emulator version 9.1.0")
    assert choose_vmm(binary=qemu) == ("qemu", f"{qemu} is QEMU emulator version 9.1.0")
    assert driver_for(settings(binary=qemu)).vmm == "qemu"
    for module in ("cloud_hypervisor", "qemu"):
        monkeypatch.setattr(f"pytest_chvm.drivers.{module}.driver.why_no_kvm", lambda: "there is none")
    assert choose_vmm(binary=stand_in_ch.path)[0] == "cloud-hypervisor"


@pytest.mark.parametrize(
    ("vmm", "version"),
    [("cloud-hypervisor", "QEMU emulator version 9.1.0"), ("qemu", "cloud-hypervisor v53.0.0"), ("qemu", "virtiofsd 1.14.0")],
)
def test_a_binary_that_is_another_program_than_the_vmm_that_is_asked_for_is_refused(vmm, version, tmp_path):
    other = program(tmp_path / "vmm", version)
    with pytest.raises(InvalidConfigError, match=f"is no {vmm}: it says '{version}'; leave out --chvm-vmm={vmm}") as caught:
        launch(settings=settings(vmm=vmm, binary=other))
    assert not isinstance(caught.value, MissingRequirementError)

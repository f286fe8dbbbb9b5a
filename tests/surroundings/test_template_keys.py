"""A template is used for a VM that is made of the very same things, and for no other."""

import functools
import os
import platform
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pytest_chvm
from pytest_chvm import Cpus, Disk, HostError, QemuDriver, UnsupportedError, VmConfig
from pytest_chvm.clones import templates
from pytest_chvm.clones.digests import content_key, file_identity
from pytest_chvm.clones.templates import made_of
from pytest_chvm.drivers.disks import plain_images
from pytest_chvm.drivers.keys import binary_key
from pytest_chvm.drivers.qemu import state as qemu_state
from pytest_chvm.drivers.qemu import vsock as qemu_vsock
from pytest_chvm.drivers.qemu.machines import MACHINES
from pytest_chvm.guest.kinds.built_in import BuiltInGuest
from pytest_chvm.guest.kinds.image import ImageGuest
from pytest_chvm.host.binaries import Binary
from pytest_chvm.machine import saving


@pytest.fixture
def own(chvm_vm, guest, tmp_path):
    """`chvm_vm` with an image of one's own, which no other test has, and without a network."""
    cmdline = f"console=ttyS0 quiet of={tmp_path.name}-{time.time_ns()}"
    return functools.partial(chvm_vm, vmm="qemu", network="none", initramfs=guest.initramfs, cmdline=cmdline)


def test_what_is_changed_while_a_template_is_made_of_it_makes_none(own, tmp_path, monkeypatch):
    disk = tmp_path / "root.img"
    disk.write_bytes(bytes(8 << 20))
    save = saving.save

    def save_and_change(machine, *arguments, **more):
        save(machine, *arguments, **more)
        with disk.open("r+b") as file:
            file.write(b"changed")

    monkeypatch.setattr(saving, "save", save_and_change)
    with pytest.raises(HostError, match="what its template is made of was changed while it was made"):
        own(root_disk=disk, boot="clone")


def test_a_files_length_is_part_of_its_content(tmp_path):
    keys = set()
    for size in (0, 1 << 16, 1 << 20, 3 << 20):
        file = tmp_path / f"of-{size}"
        file.touch()
        os.truncate(file, size)
        keys.add(content_key(file, tmp_path / "cache"))
    assert len(keys) == 4


def test_a_digest_is_not_believed_of_a_file_that_may_have_changed_within_its_times_resolution(tmp_path):
    file = tmp_path / "disk"
    file.write_bytes(b"content")
    true = content_key(file, tmp_path)
    [kept] = (tmp_path / "digests").iterdir()
    # As it would be of the content before, had the file been written twice within one tick.
    kept.write_text("0" * 64)
    assert content_key(file, tmp_path) == true
    # Of a file that was not changed for a while it is.
    kept.write_text("0" * 64)
    os.utime(kept, (time.time() + 10, time.time() + 10))
    assert content_key(file, tmp_path) == "0" * 64


@pytest.fixture
def key(guest):
    """All that a template of the built-in guest depends on."""

    def make(*, kind=BuiltInGuest, ready_marker="CHVM_READY", **config):
        config = VmConfig(**{"kernel": guest.kernel, "initramfs": guest.initramfs, **config})
        return made_of(kind(config), QemuDriver(), file_identity, network_mode="tap", ready_marker=ready_marker)

    return make


@pytest.mark.parametrize(
    "config",
    [
        {"cpus": 2}, {"max_cpus": 2}, {"cpu": "Nehalem"}, {"cpus": Cpus(cores=2)}, {"nested": True}, {"rng": False}, {"balloon": True}, {"iommu": True}, {"memory_mb": 300}, {"max_memory_mb": 512}, {"hotplug": True},
        {"networks": []}, {"cmdline": "quiet"}, {"kernel": Path(__file__)}, {"initramfs": Path(__file__)}, {"root_disk": Path(__file__)},
        {"disks": [Disk(size_mb=8)]}, {"disks": [Disk(Path(__file__), read_only=True)]},
    ],
    ids=lambda config: next(iter(config)),
)  # fmt: skip
def test_what_a_vm_is_made_of_is_in_the_key(key, config):
    assert key(**config) != key() == key()


def test_the_word_that_an_image_says_that_it_is_ready_with_is_in_the_key(key):
    image = functools.partial(key, kind=ImageGuest)
    assert image(ready_marker="VMRS_READY") != image() == image()
    assert image() != key()
    # The built-in guest says what it is told, booted or cloned.
    assert key(ready_marker="VMRS_READY") == key()


PRINT_KEY = """
from pytest_chvm.clones.templates import made_of
from pytest_chvm.drivers.qemu.driver import QemuDriver
from pytest_chvm.guest.kinds.built_in import BuiltInGuest
from pytest_chvm.model import VmConfig
print(made_of(BuiltInGuest(VmConfig()), QemuDriver(), str, network_mode="tap", ready_marker="CHVM_READY"))
"""


def test_the_code_that_makes_templates_is_in_the_key(tmp_path):
    package = Path(pytest_chvm.__file__).parent
    shutil.copytree(package, tmp_path / "pytest_chvm", ignore=shutil.ignore_patterns("__pycache__"))

    def printed():
        environment = {**os.environ, "PYTHONPATH": os.fspath(tmp_path)}
        return subprocess.run(
            [sys.executable, "-c", PRINT_KEY], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, check=True
        ).stdout

    keys = [printed()]
    assert printed() == keys[0]
    for name in ("drivers/qemu/driver.py", "guest/init.sh"):
        with (tmp_path / "pytest_chvm" / name).open("a") as file:
            file.write("# changed\n")
        keys.append(printed())
    assert len(set(keys)) == 3


def test_the_build_of_the_hosts_kernel_and_what_its_kvm_is_told_are_in_the_key(key, monkeypatch, tmp_path):
    keys = [key()]
    monkeypatch.setattr(platform, "version", lambda: "#2 SMP another build")
    keys.append(key())
    monkeypatch.setattr(templates, "KVM_MODULES", tmp_path)
    nested = tmp_path / "kvm_amd" / "parameters" / "nested"
    nested.parent.mkdir(parents=True)
    for value in ("N\n", "Y\n"):
        nested.write_text(value)
        keys.append(key())
    assert all(keys[n] != keys[m] for n in range(4) for m in range(n))


def test_a_program_in_the_place_of_another_is_told_also_with_the_same_size_and_time(tmp_path):
    programs = {}
    for name in ("one", "two"):
        programs[name] = tmp_path / name
        programs[name].write_text(f"#!/bin/sh\n# {name}\n")
        os.utime(programs[name], (1, 1))
    link = tmp_path / "qemu"
    link.symlink_to(programs["one"])
    before = binary_key(Binary(link, "9.1"))
    assert before == binary_key(Binary(link, "9.1"))
    link.unlink()
    link.symlink_to(programs["two"])
    assert binary_key(Binary(link, "9.1")) != before
    before = binary_key(Binary(programs["one"], "9.1"))
    os.replace(programs["two"], programs["one"])
    assert binary_key(Binary(programs["one"], "9.1")) != before


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the firmware is x86's")
def test_the_firmware_of_qemu_is_in_the_key(tmp_path):
    qemu = tmp_path / "qemu"
    qemu.write_text(f"#!/bin/sh\necho {tmp_path}/first; echo {tmp_path}/second\n")
    qemu.chmod(0o755)
    names = MACHINES["x86_64"].firmware
    assert qemu_state.firmware_key(qemu, names) == []
    for name in ("second", "first"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "bios-256k.bin").write_text("SeaBIOS")
        assert qemu_state.firmware_key(qemu, names)[0] == f"{tmp_path}/{name}/bios-256k.bin"
    # The real one has some.
    assert any(place.endswith("bios-256k.bin") for place in qemu_state.firmware_key(QemuDriver().binary().path, names))


def test_a_node_of_a_driver_that_is_not_there_is_no_vsock(needs_root, tmp_path, monkeypatch):
    node = tmp_path / "vhost-vsock"
    # A number of a range for experiments (Documentation/admin-guide/devices.txt), which no driver has.
    os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(120, 77))
    monkeypatch.setattr(qemu_vsock, "NODE", str(node))
    if not os.access(node, os.R_OK):
        pytest.skip("device nodes cannot be used here")
    assert "cannot be opened" in qemu_vsock.why_no_vsock()
    assert qemu_vsock.open_device("vm") is None


def test_all_of_a_long_chain_of_images_is_in_the_key_or_there_is_none(tmp_path):
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    below = tmp_path / "0.img"
    below.write_bytes(bytes(1 << 20))
    for number in range(1, 13):
        image = tmp_path / f"{number}.img"
        form = "raw" if number == 1 else "qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", form, "-b", below, image], check=True)
        below = image
        if number <= 10:
            assert len(plain_images(image)) == number + 1
        else:
            with pytest.raises(UnsupportedError, match="stands on more than 10 images"):
                plain_images(image)

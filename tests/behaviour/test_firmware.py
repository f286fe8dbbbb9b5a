"""firmware="uefi": the boot loader that is on a disk boots what is there."""

import platform
import tarfile
from functools import partial

import pytest

from pytest_chvm import InvalidConfigError, MissingRequirementError, Settings, launch
from pytest_chvm.base.cache import default_cache_dir
from pytest_chvm.base.progress import show_progress
from pytest_chvm.drivers.cloud_hypervisor import firmware as ch_firmware
from pytest_chvm.drivers.qemu import firmware as qemu_firmware
from pytest_chvm.guest.builders.disk import LOADER, Layout, make_disk
from pytest_chvm.guest.builders.tools import check_tools
from pytest_chvm.guest.packages import PackageError, fetch_package
from pytest_chvm.machine.guest_choice import built_in_kernel
from tests.relay import CLOUD_HYPERVISOR


def has_firmware(find):
    try:
        find()
    except MissingRequirementError:
        return False
    return True


VMMS = [
    name
    for name, find in (
        ("qemu", partial(qemu_firmware.find_firmware, platform.machine())),
        (CLOUD_HYPERVISOR, ch_firmware.find_firmware),
    )
    if has_firmware(find)
]


@pytest.fixture(scope="module")
def uefi_disk(guest, tmp_path_factory):
    """A disk with systemd-boot and the built-in guest, which says that it is ready by itself."""
    place = tmp_path_factory.mktemp("uefi")
    try:
        check_tools()
        loader = fetch_package("systemd-boot-efi", Settings.resolve().cache_dir or default_cache_dir(), show_progress)
    except (MissingRequirementError, PackageError) as error:
        pytest.skip(f"no disk can be made here: {error}")
    with tarfile.open(place / "root.tar", "w") as tar:
        tar.add(built_in_kernel(Settings.resolve()).image, "boot/vmlinuz-1")
        tar.add(guest.initramfs, "boot/initrd.img-1")
        tar.add(loader / LOADER, LOADER)
    layout = Layout(
        384, "6dfc8d29-8bd4-4f5d-9a52-8e3b0c0f7d11", "The built-in guest", "console=ttyS0 quiet chvm.hostname=behind-firmware"
    )
    make_disk(place / "root.tar", layout, place, place / "disk.qcow2")
    return place / "disk.qcow2"


@pytest.fixture
def empty_seed(tmp_path):
    """A seed that says nothing, of one's own: the guest is not told of anything then."""
    seed = tmp_path / "seed.iso"
    seed.write_bytes(bytes(1 << 20))
    return seed


@pytest.mark.parametrize("vmm", VMMS, scope="module")
def test_a_disks_own_boot_loader_boots_it(chvm_vm, vmm, uefi_disk, empty_seed):
    before = uefi_disk.read_bytes()[:4096], uefi_disk.stat().st_mtime_ns
    vm = chvm_vm(vmm=vmm, firmware="uefi", root_disk=uefi_disk, seed_iso=empty_seed, network="none", memory_mb=384)
    assert vm.check_output("hostname") == "behind-firmware\n"
    words = vm.check_output("ls -d /sys/firmware/efi; cat /proc/cmdline")
    assert words.startswith("/sys/firmware/efi\n")
    assert r"initrd=\initrd.img-1" in words
    assert "root=UUID=6dfc8d29-8bd4-4f5d-9a52-8e3b0c0f7d11" in words
    assert (uefi_disk.read_bytes()[:4096], uefi_disk.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "firmware='uefi' boots what is on a root_disk: name one"),
        ({"cmdline": "quiet"}, "firmware='uefi' boots what is on the root_disk: leave out cmdline"),
        ({"kernel": "vmlinuz", "initramfs": "initrd"}, "leave out kernel and initramfs"),
        ({"root": "host"}, "leave out root"),
        ({"root_disk": "gone.qcow2"}, "gone.qcow2' does not exist"),
    ],
)
def test_what_firmware_cannot_boot_is_refused_at_once(arguments, said):
    with pytest.raises(InvalidConfigError, match=said):
        launch(vmm="qemu", firmware="uefi", **arguments)


def test_another_firmware_is_refused():
    with pytest.raises(InvalidConfigError, match="firmware='bios', expected 'uefi'"):
        launch(vmm="qemu", firmware="bios", root_disk="disk.qcow2")


def test_without_firmware_it_says_what_to_install(monkeypatch, tmp_path, empty_seed):
    monkeypatch.setattr(qemu_firmware, "PLACES", (tmp_path, tmp_path / "share"))
    (tmp_path / "50-broken.json").write_text("{")
    (tmp_path / "60-gone.json").write_text('{"interface-types": ["uefi"], "mapping": {}}')
    with pytest.raises(MissingRequirementError, match=r"needs UEFI firmware of x86_64 for QEMU, .*: install ovmf"):
        launch(vmm="qemu", firmware="uefi", root_disk=empty_seed)

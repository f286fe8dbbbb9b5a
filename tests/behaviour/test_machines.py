"""What a machine is made of beside the usual: further disks, topology, memory, devices, with both VMMs."""

import subprocess

import pytest

from pytest_chvm import BootFailedError, Disk, InvalidConfigError

# An NVMe controller fills its serial number up with spaces.
BY_SERIAL = "grep -lsx '{} *' /sys/block/*/serial /sys/block/*/device/serial | cut -d/ -f4"
SIZES = "for block in /sys/block/*; do echo ${block##*/} $(($(cat $block/size) / 2048)); done"


@pytest.fixture
def image(tmp_path):
    """A raw image of 8 MiB with a mark at its start."""
    file = tmp_path / "disk.img"
    file.write_bytes(b"mark" + bytes((8 << 20) - 4))
    return file


def test_disks_of_ones_own_are_there_by_their_serials_and_clones_have_them_too(boot, image):
    disks = [Disk(size_mb=16, serial="scratch"), Disk(image, serial="kept"), Disk(image, read_only=True, serial="seen")]
    vm = boot(disks=disks[:2], boot="clone", network="none")
    kept, scratch = (vm.check_output(BY_SERIAL.format(serial)).strip() for serial in ("kept", "scratch"))
    assert (scratch, kept) == ("vda", "vdb")
    assert vm.check_output(f"head -c 4 /dev/{kept}") == "mark"
    vm.check_output(f"printf over >/dev/{kept}; printf over >/dev/{scratch}; sync")
    vm.stop()
    assert image.read_bytes()[:4] == b"over"
    other = boot(disks=[disks[0], disks[2]], boot="clone", network="none")
    assert other.check_output("head -c 4 /dev/vdb; head -c 4 /dev/vda | od -An -tx1") == "over 00 00 00 00\n"
    assert other.run("printf no >/dev/vdb").returncode != 0
    # What was written before a snapshot is its clones', and what is written after it each one's own.
    other.check_output("printf then >/dev/vda; sync")
    clone = other.snapshot().clone()
    other.check_output("printf late >/dev/vda; sync")
    assert clone.check_output("head -c 4 /dev/vda") == "then"


def test_a_disk_may_be_memory(boot, tmp_path):
    image = tmp_path / "pmem.img"
    image.write_bytes(b"mark" + bytes((16 << 20) - 4))
    vm = boot(disks=[Disk(image, bus="pmem"), Disk(size_mb=32, bus="pmem")], network="none")
    sizes = dict(line.split() for line in vm.check_output(SIZES).splitlines())
    assert sorted(sizes) == ["pmem0", "pmem1"]
    assert vm.check_output("head -c 4 /dev/pmem0") == "mark"
    vm.check_output("printf over | dd of=/dev/pmem0 conv=notrunc; sync")
    vm.shutdown()
    assert image.read_bytes()[:4] == b"over"
    # Of those that go with the VM there are clones.
    clone = boot(disks=[Disk(size_mb=32, bus="pmem")], network="none", boot="clone")
    assert clone.check_output("head -c 4 /dev/pmem0 | od -An -tx1") == " 00 00 00 00\n"


def test_disks_on_other_buses_with_blocks_of_a_page(chvm_vm, image):
    """Cloud Hypervisor has neither, and says so: `tests/drivers/test_cloud_hypervisor_command.py`."""
    disks = [
        Disk(image, bus="nvme", serial="fast"),
        Disk(size_mb=16, bus="nvme", block_size=4096, serial="page"),
        Disk(size_mb=20, bus="scsi", serial="old"),
        Disk(size_mb=24, bus="nvdimm"),
        Disk(size_mb=28, serial="plain"),
    ]
    vm = chvm_vm(vmm="qemu", disks=disks, network="none", boot="clone")
    sizes = dict(line.split() for line in vm.check_output(SIZES).splitlines())
    assert sizes == {"nvme0n1": "8", "nvme1n1": "16", "sda": "20", "pmem0": "24", "vda": "28"}
    page = vm.check_output(BY_SERIAL.format("page")).strip()
    assert vm.check_output(f"cat /sys/block/{page}/queue/logical_block_size") == "4096\n"
    assert vm.check_output("cat /sys/block/sda/device/vpd_pg80").endswith("old")


def test_a_disk_whose_driver_the_kernel_lacks_is_an_error_that_names_it(chvm_vm, tmp_path, guest):
    """As a kernel without modules beside it has none."""
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(guest.kernel.read_bytes())
    with pytest.raises(
        BootFailedError, match=r"without .*disks\[0\], an empty one of 16 MiB \(/dev/sda\).*Its kernel has no modules"
    ):
        chvm_vm(vmm="qemu", kernel=kernel, disks=[Disk(size_mb=16, bus="scsi")], network="none", boot="cold")


def test_an_image_that_cannot_be_memory_is_refused(chvm_vm, tmp_path):
    image = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "8M"], check=True)
    with pytest.raises(InvalidConfigError, match=r"disks\[0\].* is to be memory .*it is a qcow2 image"):
        chvm_vm(disks=[Disk(image, bus="pmem")])

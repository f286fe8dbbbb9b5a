"""What a machine is made of beside the usual: further disks, topology, memory, devices, with both VMMs."""

import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from pytest_chvm import BootFailedError, Cpus, Disk, InvalidConfigError, MissingRequirementError, UnsupportedError
from tests.relay import CLOUD_HYPERVISOR, require_binary

# An NVMe controller fills its serial number up with spaces.
BY_SERIAL = "grep -lsx '{} *' /sys/block/*/serial /sys/block/*/device/serial | cut -d/ -f4"
# Of all but the disk with the kernel's modules.
SIZES = (
    "for block in /sys/block/*; do grep -sq chvm-modules $block/serial || echo ${block##*/} $(($(cat $block/size) / 2048)); done"
)


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


def test_processors_have_sockets_threads_and_numa_nodes(boot):
    vm = boot(cpus=Cpus(sockets=2, threads=2, numa_nodes=2), network="none")
    each = "for cpu in /sys/devices/system/cpu/cpu[0-9]*; do cd $cpu; echo {} $(ls -d node*); done"
    facts = "$(cat topology/physical_package_id) $(cat topology/thread_siblings_list)"
    packages = vm.check_output(each.format(facts)).splitlines()
    assert packages == ["0 0-1 node0", "0 0-1 node0", "1 2-3 node1", "1 2-3 node1"]
    nodes = vm.check_output("sed -n 's/.*MemTotal: *\\([0-9]*\\) kB/\\1/p' /sys/devices/system/node/node*/meminfo").split()
    assert len(nodes) == 2
    assert all(64 << 10 < int(size) <= 128 << 10 for size in nodes)


def test_a_clone_has_a_balloon_and_can_have_guests_of_its_own(boot, vmm):
    vm = boot(balloon=True, nested=vmm != CLOUD_HYPERVISOR, network="none", boot="clone")
    assert vm.run("ls -d /sys/bus/virtio/drivers/virtio_balloon/virtio*").returncode == 0
    assert vm.run("[ -c /dev/kvm ]").returncode == 0 or vmm == CLOUD_HYPERVISOR


def test_a_machine_of_qemus_own_making(chvm_vm):
    own = 'it\'s \\ a "$(b)"'
    words = ["-device", "edu", "-fw_cfg", f"name=opt/own,string={own}"]
    vm = chvm_vm(vmm="qemu", cpu="max,-avx2", rng=False, iommu=True, vmm_args=words, network="none")
    assert vm.origin.why == "of what its vmm_args stand for nothing is known"
    assert vm.handle.command[-4:] == tuple(words)
    flags = vm.check_output("grep -m1 flags /proc/cpuinfo").split()
    assert "avx" in flags
    assert "avx2" not in flags
    assert vm.run("grep -q virtio_rng /sys/class/misc/hw_random/rng_available").returncode == 1
    assert vm.check_output("ls /sys/class/iommu") == "dmar0\n"
    assert vm.run("grep -q 0x11e8 /sys/bus/pci/devices/*/device").returncode == 0
    assert vm.check_output("cat /sys/firmware/qemu_fw_cfg/by_name/opt/own/raw") == own


def test_an_iommu_that_the_kernel_would_not_use_is_refused(chvm_vm):
    require_binary()
    with pytest.raises((MissingRequirementError, UnsupportedError), match=r"CONFIG_VIRTIO_IOMMU|no usable KVM"):
        chvm_vm(vmm="cloud-hypervisor", iommu=True, network="none")


@pytest.fixture
def free_hugepages():
    """Some hugepages for this test alone; skipped where the host gives none."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    before = setting.read_text()
    try:
        setting.write_text(f"{int(before) + 64}")
    except OSError as error:
        pytest.skip(f"no hugepages can be set aside here: {error}")
    yield
    setting.write_text(before)


def test_memory_is_on_hugepages_where_enough_are_free(boot, free_hugepages):
    def free():
        return next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "HugePages_Free" in line)

    before = free()
    if before < 64:
        pytest.skip(f"the host could set aside only {before} hugepages")
    vm = boot(hugepages=True, memory_mb=128, network="none")
    assert "hugepages" in vm.origin.why
    assert free() < before
    with pytest.raises(MissingRequirementError, match=r"needs \d+ free hugepages .*'sysctl vm.nr_hugepages="):
        boot(hugepages=True, memory_mb=512, network="none", name="second")
    with pytest.raises(InvalidConfigError, match=r"memory_mb=129 on hugepages, expected a multiple of 2"):
        boot(hugepages=True, memory_mb=129, network="none", name="odd")


def notes_of(core):
    """The notes of an ELF core by their owner, and whether the segments have a text."""
    with core.open("rb") as file:
        segments = list(ELFFile(file).iter_segments())
        return {note["n_name"]: note["n_desc"] for each in segments if each["p_type"] == "PT_NOTE" for note in each.iter_notes()}


def test_a_guests_memory_can_be_written_to_a_file_when_it_has_panicked_too(boot, vmm, tmp_path):
    vm = boot(network="none")
    vm.check_output("echo mark-$((6 * 7))-mark >/tmp/mark")
    if vmm == CLOUD_HYPERVISOR:
        with pytest.raises(UnsupportedError, match="guest_debug"):
            vm.dump_memory(tmp_path / "core")
        assert vm.check_output("echo there") == "there\n"
        return
    core = vm.dump_memory(tmp_path / "core")
    assert b"mark-42-mark" in core.read_bytes()
    assert f"OSRELEASE={vm.kernel.release}".encode() in bytes_of(notes_of(core)["VMCOREINFO"])
    vm.pause()
    vm.dump_memory(core)
    vm.resume()
    with vm.expect_panic():
        vm.run("echo c >/proc/sysrq-trigger")
    assert "VMCOREINFO" in notes_of(vm.dump_memory(core))
    with pytest.raises(OSError, match="no such directory"):
        vm.dump_memory(tmp_path / "missing" / "core")


def bytes_of(described):
    """The content of a note, which pyelftools gives as text where it does not know the note."""
    return described if isinstance(described, bytes) else described.encode("latin-1")


def said_by_stub(place, packet):
    """What the stub for a debugger answers to one packet of GDB's remote serial protocol."""
    with socket.socket(socket.AF_UNIX) as stub:
        stub.settimeout(20)
        stub.connect(place)
        stub.sendall(b"$%s#%02x" % (packet, sum(packet) % 256))
        said = b""
        while b"#" not in said:
            said += stub.recv(4096)
        # Let go of: the guest goes on.
        stub.sendall(b"+$D#44")
        stub.recv(4096)
        return said


def test_a_debugger_finds_the_guest_at_its_first_instruction_or_later(chvm_vm, tmp_path):
    vm = chvm_vm(vmm="qemu", gdb="wait", network="none")
    gdb, option, attach, *_symbols = vm.gdb_command
    assert (gdb, option) == ("gdb", "-ex")
    assert vm.console == ""
    assert b"$T" in said_by_stub(attach.removeprefix("target remote "), b"?")
    vm.wait_ready()
    assert vm.check_output("echo up") == "up\n"
    if shutil.which("gdb"):
        command = [*vm.gdb_command, "-batch", "-ex", "info registers rip"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        assert "rip " in done.stdout, done
        assert vm.check_output("echo on") == "on\n"


def test_a_debugger_without_a_stub_is_refused(vm, chvm_vm, vmm):
    with pytest.raises(UnsupportedError, match="start it with gdb=True"):
        _ = vm.gdb_command
    if vmm == CLOUD_HYPERVISOR:
        with pytest.raises(UnsupportedError, match=r"cannot have a debugger attached .*guest_debug"):
            chvm_vm(vmm=vmm, gdb=True, network="none")

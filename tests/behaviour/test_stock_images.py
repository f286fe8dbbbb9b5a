"""Stock images: `root_disk=` alone. The images here are as small as a system can be, and know nothing of us."""

import hashlib
import re
import shutil
import socket

import pytest

from pytest_chvm import InvalidConfigError, SharedDir, UnsupportedError
from tests.behaviour import images

# Stands for OpenSSH's, which a system of a few megabytes does not have.
SSH_KEYGEN = """\
#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in -f) file=$2 ;; -t) type=$2 ;; esac
    shift
done
{ echo "a key of type $type" && cat /proc/sys/kernel/random/uuid; } >$file
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The root of the system that all images here have."""
    tree = images.tiny_tree(tmp_path_factory.mktemp("tree") / "root", root="/dev/sda2")
    (tree / "usr/bin/ssh-keygen").write_text(SSH_KEYGEN)
    (tree / "usr/bin/ssh-keygen").chmod(0o755)
    for kind in ("ed25519", "rsa"):
        (tree / f"etc/ssh/ssh_host_{kind}_key").write_text(f"the image's own {kind}\n")
    return tree


@pytest.fixture(scope="module")
def image(tree, tmp_path_factory):
    """A stock image as one downloads it: partitioned, compressed, on top of another."""
    directory = tmp_path_factory.mktemp("image")
    disk = images.partitioned(directory / "disk.raw", images.ext4(tree, directory / "file-system"))
    return images.qcow2(disk, directory / "stock.qcow2")


def digests(image):
    """Return the hashes of an image and what it stands on."""
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(image.parent.glob("stock*"))]


# In the lab the image is made, looked at and booted by an emulated processor that is itself emulated.
@pytest.mark.timeout(800)
def test_an_image_alone_boots_its_own_system(boot, image):
    before = digests(image)
    vm = boot(root_disk=image, name="stock_image", boot="cold")
    # It was ready when its boot scripts were through, and not before.
    assert vm.check_output("cat /run/by-the-image") == "started\n"
    words = vm.check_output("cat /proc/cmdline").split()
    assert "of-the-image" in words
    assert "quiet" in words
    assert not {"another", "console=tty0", "ro", "loglevel=5"} & set(words)
    assert vm.check_output("readlink /proc/1/exe; hostname") == "/bin/busybox\nstock-image\n"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((vm.ip, 1), 10)
    vm.check_output("echo mine >/root/mine; sync")
    assert digests(image) == before


def test_its_clones_are_machines_of_their_own(chvm_vm, image, tmp_path):
    seed = tmp_path / "seed.iso"
    seed.write_bytes(b"seed of the test" + bytes((1 << 16) - 16))
    clones = [chvm_vm(vmm="qemu", root_disk=image, seed_iso=seed, name=name, boot="clone") for name in ("one", "two")]
    facts = "cat /etc/machine-id /sys/class/net/eth0/address /etc/ssh/ssh_host_ed25519_key; hostname; head -c 16 /dev/urandom | od -An -tx1"
    identities = [[vm.ip, *vm.check_output(facts).splitlines()] for vm in clones]
    frame = {"-----BEGIN OPENSSH PRIVATE KEY-----", "-----END OPENSSH PRIVATE KEY-----"}
    for one, two in zip(*identities, strict=True):
        # The first lines of all such keys are the same.
        assert one != two or one in frame or one.startswith("b3BlbnNzaC1rZXktdjEA"), identities
    for vm, identity in zip(clones, identities, strict=True):
        assert {vm.name} | frame <= set(identity)
        assert vm.check_output("cat /etc/ssh/ssh_host_ed25519_key.pub").endswith(f" root@{vm.name}\n")
        vm.wait_until("grep -q 'of type rsa' /etc/ssh/ssh_host_rsa_key", timeout=60)
        assert f"inet {vm.ip}/" in vm.check_output("ip -4 addr show dev eth0")
        assert vm.check_output("head -c 16 /dev/vdb") == "seed of the test"


def test_the_second_vm_of_an_image_is_a_clone_and_reboots_as_itself(chvm_vm, tree, tmp_path):
    image = images.ext4(tree, tmp_path / "never-seen")
    first, second = (chvm_vm(vmm="qemu", root_disk=image, name=name) for name in ("first", "second"))
    assert [first.origin.boot, second.origin.boot] == ["cold", "clone"]
    assert "the first of its image" in first.origin.why
    address = second.ip
    second.reboot()
    assert (second.ip, second.check_output("cat /run/by-the-image; hostname")) == (address, "started\nsecond\n")


@pytest.mark.parametrize("kind", ["btrfs without partitions", "xfs without partitions", "ext4 with an MBR and no boot loader"])
def test_file_systems_and_partition_tables(chvm_vm, tree, tmp_path, kind):
    disk, file_system = tmp_path / "disk.img", tmp_path / "file-system"
    file_system_type = kind.split()[0]
    if (make := {"btrfs": images.btrfs, "xfs": images.xfs}.get(file_system_type)) is not None:
        if shutil.which(f"mkfs.{file_system_type}") is None:
            pytest.skip(f"no mkfs.{file_system_type} here")
        make(tree, disk)
    else:
        own = tmp_path / "tree"
        shutil.copytree(tree, own, symlinks=True)
        shutil.rmtree(own / "boot/grub")
        images.partitioned(disk, images.ext4(own, file_system), label="dos")
    vm = chvm_vm(vmm="qemu", root_disk=disk, network="none", boot="cold")
    root = vm.check_output("grep ' / ' /proc/mounts | tail -n 1").split()
    assert root[2] == file_system_type
    assert vm.check_output("cat /run/by-the-image") == "started\n"
    if "no boot loader" in kind:
        # The kernel says on the serial console what it warns of, and no more.
        assert re.search(r"root=UUID=[0-9a-f-]{36} console=\S+ quiet loglevel=5 ", vm.check_output("cat /proc/cmdline"))


def test_of_two_systems_the_one_is_booted_whose_partition_the_boot_loader_names(chvm_vm, tree, tmp_path):
    named = "3f6bc2ab-0123-4567-89ab-cdef01234567"
    second, first = tmp_path / "second", tmp_path / "first"
    shutil.copytree(tree, second, symlinks=True)
    grub_cfg = second / "boot/grub/grub.cfg"
    grub_cfg.write_text(grub_cfg.read_text().replace("root=/dev/sda2", f"root=PARTUUID={named}"))
    for name in ("etc", "sbin", "dev", "proc", "sys", "run"):
        (first / name).mkdir(parents=True)
    (first / "sbin/init").write_text("#!/bin/sh\necho the wrong system\n")
    disk = images.partitioned(tmp_path / "disk.raw", images.ext4(second, tmp_path / "root"), named=f", uuid={named}")
    images.put(images.ext4(first, tmp_path / "other", "1M"), disk, at_mb=1)
    vm = chvm_vm(vmm="qemu", root_disk=disk, network="none", boot="cold")
    assert vm.check_output("cat /run/by-the-image") == "started\n"


def test_what_cloud_init_is_told_wants_an_image_that_has_it(chvm_vm, image):
    with pytest.raises(
        InvalidConfigError, match=r"user_data, meta_data is for an image's cloud-init.*stock.qcow2' has none.*guest build"
    ):
        chvm_vm(vmm="qemu", root_disk=image, network="none", user_data={"packages": ["nginx"]}, meta_data={"a": "b"})


def test_a_shared_dir_is_mounted_where_the_built_in_guest_has_it(chvm_vm, image, tmp_path):
    (tmp_path / "file").write_text("shared")
    shared = [SharedDir("code", tmp_path), SharedDir("other", tmp_path, read_only=True, mount="/srv/a place")]
    vm = chvm_vm(vmm="qemu", root_disk=image, network="none", shared_dirs=shared)
    assert vm.check_output("cat /mnt/code/file '/srv/a place/file'") == "sharedshared"


def test_an_image_without_a_system_says_what_is_there(chvm_vm, tmp_path):
    empty = images.ext4(tmp_path, tmp_path.with_name("empty"), "8M")
    disk = images.partitioned(tmp_path / "disk.raw", empty)
    with disk.open("r+b") as file:
        file.seek(2048 * 512)
        file.write(b"LUKS\xba\xbe")
    with pytest.raises(InvalidConfigError, match=r"no system .* vda2 is ext4, without an init; vda1 is encr") as info:
        chvm_vm(vmm="qemu", root_disk=disk, network="none")
    assert "LVM, encryption, RAID) boots with kernel=, initramfs= and cmdline= of its own" in str(info.value)


def test_what_no_clone_can_have_is_said(chvm_vm, image, tmp_path):
    with pytest.raises(UnsupportedError, match="cannot be a clone: what its image does with a data_disk or shared dirs"):
        chvm_vm(vmm="qemu", root_disk=image, network="none", boot="clone", shared_dirs={"code": tmp_path})

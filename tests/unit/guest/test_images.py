"""Stock images: what is read of one, on texts and bytes as images have them, and on any others."""

import json
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_chvm.guest.images.boot_entries import chosen_entry, newest
from pytest_chvm.guest.images.inspect import NOT_TAKEN, _with_dependencies
from pytest_chvm.guest.images.superblocks import HEAD_BYTES, identify, partitions, what_else

DEBIAN = """
set default="0"
menuentry 'Debian GNU/Linux' --class debian --class gnu-linux $menuentry_id_option 'gnulinux-simple-1' {
	insmod part_gpt
	linux	/boot/vmlinuz-6.1.0-13-cloud-amd64 root=PARTUUID=1-2 ro  console=tty0 console=ttyS0,115200 earlyprintk=ttyS0,115200
	initrd	/boot/initrd.img-6.1.0-13-cloud-amd64
}
submenu 'Advanced options' $menuentry_id_option 'gnulinux-advanced-1' {
	menuentry 'Debian, with Linux 6.1.0-12 (recovery mode)' $menuentry_id_option 'gnulinux-6.1.0-12-recovery' {
		linux	/boot/vmlinuz-6.1.0-12-cloud-amd64 root=PARTUUID=1-2 ro single
	}
	menuentry 'Debian, with Linux 6.1.0-12' $menuentry_id_option 'gnulinux-6.1.0-12' {
		linux	/boot/vmlinuz-6.1.0-12-cloud-amd64 root=PARTUUID=1-2 ro
	}
}
"""
FEDORA = (
    "title Fedora\nversion {0}\nlinux /vmlinuz-{0}\ninitrd /initramfs-{0}.img\noptions root=UUID=1 ro rootflags=subvol=root $more\n"
)


def test_the_first_entry_of_a_grub_cfg_is_what_is_booted():
    entry = chosen_entry({"/vda1/boot/grub/grub.cfg": DEBIAN})
    assert entry.kernel == "/boot/vmlinuz-6.1.0-13-cloud-amd64"
    assert entry.options.split()[:2] == ["root=PARTUUID=1-2", "ro"]


def test_the_entry_that_was_saved_as_the_default_is_what_is_booted():
    saved = {
        "/vda1/boot/grub/grub.cfg": DEBIAN,
        "/vda1/boot/grub/grubenv": "# GRUB Environment Block\nsaved_entry=gnulinux-6.1.0-12\n####",
    }
    assert chosen_entry(saved).kernel == "/boot/vmlinuz-6.1.0-12-cloud-amd64"
    numbered = {"/vda1/boot/grub/grub.cfg": DEBIAN.replace('default="0"', 'default="2"')}
    assert chosen_entry(numbered).options == "root=PARTUUID=1-2 ro"


def test_of_boot_loader_entries_the_newest_is_booted_and_never_the_rescue_system():
    texts = {
        "/vda2/loader/entries/a-6.9.5-200.fc40.x86_64.conf": FEDORA.format("6.9.5-200.fc40.x86_64"),
        "/vda2/loader/entries/a-6.10.1-200.fc40.x86_64.conf": FEDORA.format("6.10.1-200.fc40.x86_64"),
        "/vda2/loader/entries/a-0-rescue.conf": FEDORA.format("0-rescue-abc"),
        "/vda2/grub2/grub.cfg": "blscfg\n",
        "/vda2/grub2/grubenv": "more=net.ifnames=0\n",
    }
    entry = chosen_entry(texts)
    assert (entry.kernel, entry.options) == (
        "/vmlinuz-6.10.1-200.fc40.x86_64",
        "root=UUID=1 ro rootflags=subvol=root net.ifnames=0",
    )


def test_the_default_label_of_extlinux_is_what_is_booted():
    text = "DEFAULT lts\nLABEL virt\n  LINUX vmlinuz-virt\n  APPEND root=LABEL=/ modules=ext4\nLABEL lts\n  LINUX vmlinuz-lts\n"
    assert chosen_entry({"/vda1/boot/extlinux.conf": text}).kernel == "vmlinuz-lts"


def test_an_image_without_a_boot_loader_boots_its_newest_kernel():
    assert chosen_entry({}) is None
    kernels = [
        "vmlinuz.old",
        "vmlinuz",
        "boot/vmlinuz-6.9.0-1",
        "boot/vmlinuz-6.10.0-1",
        "boot/vmlinuz-0-rescue-7",
        "boot/initrd.img-7",
    ]
    assert newest(kernels) == "boot/vmlinuz-6.10.0-1"
    assert newest(["usr/lib/modules/6.9.1/vmlinuz", "usr/lib/modules/6.12.0/vmlinuz"]) == "usr/lib/modules/6.12.0/vmlinuz"
    assert newest(["boot/grub"]) is None


@given(st.dictionaries(st.sampled_from(["/a/grub.cfg", "/a/grubenv", "/a/loader/entries/b.conf", "/a/extlinux.conf"]), st.text()))
def test_whatever_a_boot_loaders_files_say_there_is_an_entry_or_none(texts):
    entry = chosen_entry(texts)
    assert entry is None or entry.kernel


def test_where_the_boot_loader_prints_and_what_our_initramfs_does_is_not_taken_over():
    words = "BOOT_IMAGE=(hd0)/vmlinuz root=UUID=1 ro rootflags=subvol=@ console=tty0 console=ttyS0,115200 rd.luks=0 quiet splash net.ifnames=0"
    assert [word for word in words.split() if not NOT_TAKEN.fullmatch(word)] == ["root=UUID=1", "quiet", "net.ifnames=0"]


@pytest.mark.parametrize(
    ("make", "type"),
    [
        (["mke2fs", "-q", "-t", "ext4", "-L", "root-of-it"], "ext4"),
        (["mkfs.btrfs", "-q", "-L", "root-of-it"], "btrfs"),
        (["mkfs.xfs", "-q", "-L", "root-of-it"], "xfs"),
    ],
)
def test_file_systems_are_told_by_how_they_begin(tmp_path, make, type):
    if shutil.which(make[0]) is None:
        pytest.skip(f"no {make[0]} here")
    file = tmp_path / "file-system"
    with file.open("wb") as image:
        image.truncate(320 << 20)
    subprocess.run([*make, file], check=True, capture_output=True)
    with file.open("rb") as image:
        found = identify(image.read(HEAD_BYTES))
    said = subprocess.run(["blkid", "-o", "export", file], capture_output=True, text=True, check=True).stdout
    assert (found.type, found.label) == (type, "root-of-it"[:12])
    assert f"\nUUID={found.uuid}\n" in said


@pytest.mark.parametrize("table", ["gpt", "dos"])
def test_partitions_have_the_names_that_blkid_gives_them(tmp_path, table):
    disk = tmp_path / "disk"
    with disk.open("wb") as image:
        image.truncate(16 << 20)
    name = ', name="the root"' if table == "gpt" else ""
    told = f"label: {table}\n2: start=4096, size=2048{name}\n1: start=2048, size=2048\n"
    subprocess.run(["sfdisk", "--quiet", disk], input=told, text=True, check=True)
    with disk.open("rb") as image:
        found = partitions(image.read(HEAD_BYTES))
    seen = json.loads(subprocess.run(["sfdisk", "--json", disk], capture_output=True, check=True).stdout)["partitiontable"]
    signature = seen["id"].removeprefix("0x").lower()
    for number, partition in enumerate(sorted(seen["partitions"], key=lambda one: one["node"]), 1):
        assert found[number].uuid == partition.get("uuid", f"{signature}-{number:02}").lower()
        assert found[number].label == partition.get("name", "")


def test_what_cannot_be_a_root_is_named():
    assert "LUKS" in what_else(b"LUKS\xba\xbe".ljust(HEAD_BYTES, b"\0"))
    assert "LVM" in what_else(bytes(512) + b"LABELONE".ljust(HEAD_BYTES, b"\0"))
    assert what_else(bytes(HEAD_BYTES)) is None


@given(st.binary(max_size=1200))
def test_any_bytes_are_a_partition_table_or_none(data):
    for head in (data, bytes(510) + b"\x55\xaa" + data, bytes(510) + b"\x55\xaaEFI PART" + bytes(64) + data):
        assert len(partitions(head.ljust(HEAD_BYTES, data[-1:] or b"\0"))) <= 128


@given(st.binary(max_size=600), st.sampled_from([0, 54, 82, 512, 0x438, 0x10040]))
def test_any_bytes_are_a_file_system_or_none(data, place):
    identify(bytes(place) + data)
    what_else(bytes(place) + data)


def test_modules_come_with_what_they_depend_on():
    text = (
        "kernel/drivers/virtio/virtio.ko.xz:\nkernel/drivers/virtio/virtio_ring.ko.xz:\n"
        "kernel/drivers/block/virtio_blk.ko.xz: kernel/drivers/virtio/virtio_ring.ko.xz kernel/drivers/virtio/virtio.ko.xz\n"
        "kernel/../../etc/shadow.ko: \nkernel/evil.ko: kernel/../../../etc/shadow\n"
    )
    found = list(_with_dependencies(text, ("virtio_blk", "shadow", "evil", "not_there")))
    assert found == [
        "kernel/drivers/block/virtio_blk.ko.xz",
        "kernel/drivers/virtio/virtio_ring.ko.xz",
        "kernel/drivers/virtio/virtio.ko.xz",
        "kernel/evil.ko",
    ]

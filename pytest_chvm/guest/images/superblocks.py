"""Partition tables and file systems by how they begin, as a VM of ours has read them; whatever is there is looked at strictly."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass

# How much of a partition is looked at: the superblock of btrfs is the farthest, at 64 KiB.
HEAD_BYTES = 68 << 10
MOST_PARTITIONS, MOST_OF_MBR = 128, 63


@dataclass(frozen=True, slots=True)
class FileSystem:
    """A file system's type, as mount(8) calls it, its UUID as blkid(8) writes it, and its label."""

    type: str
    uuid: str
    label: str = ""


def identify(head: bytes) -> FileSystem | None:
    """Return the file system that a partition begins with, None for one that is not known here."""
    for place, magic, read in FILE_SYSTEMS:
        if head[place : place + len(magic)] == magic and len(head) >= 4096:
            return read(head)
    return None


@dataclass(frozen=True, slots=True)
class Partition:
    """What a partition table calls a partition: its PARTUUID and PARTLABEL as blkid(8) writes them."""

    uuid: str
    label: str = ""


def partitions(head: bytes) -> dict[int, Partition]:
    """Return the partitions of a disk that begins so, by the numbers that Linux gives them; none where there is no table.

    GPT: UEFI specification, 5.3. An MBR's have no UUIDs of their own: Linux makes them (block/partitions/msdos.c).
    """
    if len(head) < 1024 or head[510:512] != b"\x55\xaa":
        return {}
    if head[512:520] != b"EFI PART":
        signature = int.from_bytes(head[0x1B8:0x1BC], "little")
        return {number: Partition(f"{signature:08x}-{number:02x}") for number in range(1, MOST_OF_MBR + 1)} if signature else {}
    start, count, size = struct.unpack_from("<QII", head, 512 + 72)
    found = {}
    for number in range(1, min(count, MOST_PARTITIONS) + 1):
        entry = head[start * 512 + (number - 1) * size :][: max(size, 128)]
        if len(entry) >= 128 and any(entry[:16]):
            label = entry[56:128].decode("utf-16-le", "replace").split("\0")[0]
            found[number] = Partition(str(uuid.UUID(bytes_le=entry[16:32])), label)
    return found


def what_else(head: bytes) -> str | None:
    """Return in words what a partition has in place of a file system, where that is known."""
    for place, magic, name in OTHERS:
        if head[place : place + len(magic)] == magic:
            return name
    return None


def _text(data: bytes) -> str:
    return data.split(b"\0")[0].decode("ascii", "replace").strip()


def _uuid(data: bytes) -> str:
    return str(uuid.UUID(bytes=data))


def _ext(head: bytes) -> FileSystem:
    # Documentation/filesystems/ext4/super.rst; ext4 mounts its elders too.
    return FileSystem("ext4", _uuid(head[0x468:0x478]), _text(head[0x478:0x488]))


def _xfs(head: bytes) -> FileSystem:
    return FileSystem("xfs", _uuid(head[32:48]), _text(head[108:120]))


def _btrfs(head: bytes) -> FileSystem:
    return FileSystem("btrfs", _uuid(head[0x10020:0x10030]), _text(head[0x1012B : 0x1012B + 256]))


def _fat(serial: int, label: int) -> Callable[[bytes], FileSystem]:
    def read(head: bytes) -> FileSystem:
        number = head[serial : serial + 4][::-1].hex().upper()
        return FileSystem("vfat", f"{number[:4]}-{number[4:]}", _text(head[label : label + 11]))

    return read


# Where the magic is, what it is, and what reads the rest.
FILE_SYSTEMS: tuple[tuple[int, bytes, Callable[[bytes], FileSystem]], ...] = (
    (0, b"XFSB", _xfs),
    (0x10040, b"_BHRfS_M", _btrfs),
    (0x438, b"\x53\xef", _ext),
    (82, b"FAT32", _fat(67, 71)),
    (54, b"FAT1", _fat(39, 43)),
)
OTHERS = (
    (0, b"LUKS\xba\xbe", "encrypted (LUKS)"),
    (512, b"LABELONE", "a physical volume of LVM"),
    (4096, b"\xfc\x4e\x2b\xa9", "a part of a RAID (md)"),
    (0, b"hsqs", "a squashfs"),
)

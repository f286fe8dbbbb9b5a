"""Checks of disk image files before a VM is started.

An image may be malformed on purpose: every field is checked before it is used, and only InvalidConfigError is raised.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pytest_chvm.drivers.disks import LONGEST_NAME, QCOW2_MAGIC, data_format
from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.guest.kernels.image import PACKED
from pytest_chvm.model import MEMORY_BUSES, MEMORY_STEP_MB, ROOT, SEED, DiskKind, VmDisk

SECTOR = 512
# How much of a file is looked at to tell what it is.
HEAD = 1 << 16
# Formats that are refused: the offset of the magic bytes, the bytes, and the format's name.
FORMATS = (
    (0x40, b"\x7f\x10\xda\xbe", "a VirtualBox image (vdi)"),
    (0, b"KDMV", "a VMware image (vmdk)"),
    (0, b"COWD", "a VMware image (vmdk)"),
    (0, b"# Disk DescriptorFile", "the description of a VMware image (vmdk)"),
    (0, b"vhdxfile", "a Hyper-V image (vhdx)"),
    (0, b"conectix", "a Virtual PC image (vhd)"),
    (0, b"QED\0", "a QED image"),
    (0, b"\x3a\xff\x26\xed", "an Android sparse image"),
)
SUFFIXES = {"gzip": (".gz", ".tgz"), "xz": (".xz",), "zstd": (".zst", ".zstd"), "bzip2": (".bz2",), "lz4": (".lz4",)}
# ECMA-119, 8.1.2: of the first volume descriptor, in the sector after the sixteen of the system area.
ISO_MAGIC_AT, ISO_MAGIC = 16 * 2048 + 1, b"CD001"
# A FAT's name for itself, in its boot sector; cloud-init takes such a seed too.
FAT_MAGIC = ((54, b"FAT"), (82, b"FAT"))
# QEMU's own limit of a chain is what memory it has.
LONGEST_CHAIN = 64
# Backing files that are no files: "nbd://", "json:{...}".
PROTOCOL = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]*:")

# Control characters: no text has them, and the first sectors of any disk do.
CONTROL = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]")


def check_disk(disk: VmDisk) -> None:
    """Raise InvalidConfigError where a file cannot be used as a disk of its kind.

    A disk that is all zeros is accepted: the guest may be about to format it.
    """
    try:
        if stat.S_ISBLK(disk.image.stat().st_mode):
            return
        _check_chain(disk)
        if disk.kind.bus in MEMORY_BUSES:
            _check_memory(disk)
    except OSError as error:
        raise InvalidConfigError(f"{disk} cannot be read: {error.strerror or error}") from error


def _check_memory(disk: VmDisk) -> None:
    with disk.image.open("rb") as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(4)
    if head == QCOW2_MAGIC or size % (MEMORY_STEP_MB << 20):
        what = "it is a qcow2 image" if head == QCOW2_MAGIC else f"it has {size} bytes"
        raise InvalidConfigError(
            f"{disk} is to be memory (bus {disk.kind.bus!r}), for which a raw image of whole {MEMORY_STEP_MB} MiB is expected, and "
            f"{what}: run 'qemu-img convert -O raw', 'truncate --size=%{MEMORY_STEP_MB}M'"
        )


def _check_chain(disk: VmDisk) -> None:
    if disk.written:
        data_format(disk.image)
    seen = [disk.image]
    while (below := _check_one(disk, seen[-1])) is not None:
        if os.path.realpath(below) in map(os.path.realpath, seen):
            raise InvalidConfigError(f"{disk} stands on itself: {' -> '.join(map(str, [*seen, below]))}")
        if not below.exists():
            raise InvalidConfigError(
                f"{disk} stands on {str(below)!r}, which does not exist: put it there, or name its new place with "
                f"'qemu-img rebase -u -F FORMAT -b PLACE {seen[-1]}'"
            )
        seen.append(below)
        if len(seen) > LONGEST_CHAIN:
            raise InvalidConfigError(f"{disk} stands on more than {LONGEST_CHAIN} images: run 'qemu-img convert' on it")
        if not below.is_file():
            return


def _check_one(disk: VmDisk, image: Path) -> Path | None:
    """Check one file, the disk's image or a backing file; returns its own backing file, if any."""
    what = str(disk) if image == disk.image else f"{disk} stands on {str(image)!r}, which"
    with image.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(HEAD)
    if head[:4] == QCOW2_MAGIC:
        if disk.kind is SEED:
            raise InvalidConfigError(f"{what} is a qcow2 image: expected an ISO")
        return _check_qcow2(what, image, head, size)
    # A backing file may be of any format that QEMU knows.
    if image == disk.image:
        _check_raw(what, disk, head, size)
    return None


def _check_raw(what: str, disk: VmDisk, head: bytes, size: int) -> None:
    image = disk.image
    for place, magic, name in FORMATS:
        if head[place : place + len(magic)] == magic:
            raise InvalidConfigError(f"{what} is {name}: run 'qemu-img convert -O qcow2 {image} DISK.qcow2', and name that")
    for magic, (name, tool) in PACKED.items():
        # A guest may write an archive to the start of its own disk.
        if head.startswith(magic) and (not disk.written or image.name.endswith(SUFFIXES[name]) or size % SECTOR):
            raise InvalidConfigError(f"{what} is packed with {name}: run '{tool}' on it, and name what comes out")
    if size < SECTOR or size % SECTOR:
        raise InvalidConfigError(
            f"{what} is no disk: it has {size} bytes, and expected was a multiple of {SECTOR}{_in_words(head)}; "
            "was it cut off, or is it another file?"
        )
    if disk.kind in FURTHER_CHECKS:
        FURTHER_CHECKS[disk.kind](what, image, head)


def _check_seed(what: str, image: Path, head: bytes) -> None:
    if not _is_seed(image, head):
        raise InvalidConfigError(
            f"{what} is no ISO{_in_words(head)}: make one with 'cloud-localds' or 'xorriso -as mkisofs -V cidata -J -r -o SEED.iso "
            "user-data meta-data'"
        )


def _check_root(what: str, _image: Path, head: bytes) -> None:
    if _is_text(head):
        raise InvalidConfigError(f"{what} is a text{_in_words(head)}: expected a raw or qcow2 disk image")


# Further checks of raw images, by kind of disk.
FURTHER_CHECKS: dict[DiskKind, Callable[[str, Path, bytes], None]] = {ROOT: _check_root, SEED: _check_seed}


def _is_seed(image: Path, head: bytes) -> bool:
    with image.open("rb") as file:
        file.seek(ISO_MAGIC_AT)
        if file.read(len(ISO_MAGIC)) == ISO_MAGIC:
            return True
    # Any other file system is the guest's to understand.
    return any(head[at : at + len(magic)] == magic for at, magic in FAT_MAGIC) or CONTROL.search(head) is not None


def _is_text(head: bytes) -> bool:
    """Tell whether the beginning of a file is lines of text; a disk has a NUL somewhere in its first sectors."""
    return b"\n" in head and not CONTROL.search(head)


def _in_words(head: bytes) -> str:
    return f", and begins with {head[:16]!r}" if head else ""


@dataclass(frozen=True, slots=True)
class _Qcow2:
    """The fields of a header (QEMU's docs/interop/qcow2.txt), big-endian from byte 4."""

    version: int
    backing_offset: int
    backing_length: int
    cluster_bits: int
    size: int
    encryption: int
    l1_size: int
    l1_offset: int
    refcounts_offset: int
    refcounts_clusters: int


def _check_qcow2(what: str, image: Path, head: bytes, size: int) -> Path | None:
    """Look at a qcow2's header and the size of its file; returns its backing file."""
    cut_off = InvalidConfigError(f"{what} is a qcow2 image that is cut off, at {size} bytes: copy or download it again")
    if len(head) < 72:
        raise cut_off
    header = _Qcow2(*struct.unpack_from(">IQIIQIIQQI", head, 4))
    if header.version < 2:
        raise InvalidConfigError(f"{what} is a qcow image of version {header.version}: run 'qemu-img convert -O qcow2' on it")
    if header.version > 3:
        # A version of a later qemu-img, which then says what is wrong with it.
        return None
    if not 9 <= header.cluster_bits <= 21:
        raise InvalidConfigError(
            f"{what} is a damaged qcow2 image: a cluster has 2^{header.cluster_bits} bytes; see 'qemu-img check'"
        )
    if header.encryption:
        raise InvalidConfigError(f"{what} is encrypted, and nothing here has its key: run 'qemu-img convert' on it")
    tables_end = max(header.l1_offset + 8 * header.l1_size, header.refcounts_offset + SECTOR)
    if (header.version == 3 and len(head) < 104) or tables_end > size or header.refcounts_offset >= 1 << 62:
        raise cut_off
    if _last_cluster(image, header, head) << header.cluster_bits >= size:
        raise cut_off
    return _backing_file(what, image, header)


def _last_cluster(image: Path, header: _Qcow2, head: bytes) -> int:
    """Return the number of the last cluster of the file that is in use, by the reference counts; 0 where that is not known.

    A file that ends before it has lost something. The counts of an image that was not closed may be old.
    """
    features, order = (int.from_bytes(head[72:80]), int.from_bytes(head[96:100])) if header.version == 3 else (0, 4)
    if features & 1 or order > 6:
        return 0
    cluster = 1 << header.cluster_bits
    with image.open("rb") as file:
        file.seek(header.refcounts_offset)
        # A refcount table of 8 MiB would be of a larger disk than any here.
        table = file.read(min(header.refcounts_clusters * cluster, 8 << 20))
        entries = len(table.rstrip(b"\0")) + 7 >> 3
        if entries == 0:
            return 0
        (block_at,) = struct.unpack(">Q", table[(entries - 1) * 8 : entries * 8])
        # The low bits are reserved.
        block_at &= ~0x1FF
        if block_at >= 1 << 62:
            return 0
        file.seek(block_at)
        block = file.read(cluster)
    if len(block) < cluster:
        # The file ends before its own table.
        return 1 << 62
    counts_before = (entries - 1) * cluster * 8 >> order
    used = len(block.rstrip(b"\0"))
    return counts_before + (max(0, used - 1) * 8 >> order)


def _backing_file(what: str, image: Path, header: _Qcow2) -> Path | None:
    if not header.backing_offset:
        return None
    if not 0 < header.backing_length <= LONGEST_NAME or header.backing_offset >= 1 << 62:
        raise InvalidConfigError(f"{what} is a damaged qcow2 image: its backing file's name is none; see 'qemu-img check'")
    with image.open("rb") as file:
        file.seek(header.backing_offset)
        name = os.fsdecode(file.read(header.backing_length))
    if not name or "\0" in name:
        raise InvalidConfigError(f"{what} is a damaged qcow2 image: its backing file's name is none; see 'qemu-img check'")
    return None if PROTOCOL.match(name) else image.parent / name.removeprefix("file:")

"""The kernel inside a bzImage, unpacked once, so that not every boot does it again.

A VMM enters it at its PVH note (xen/elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY) without the real-mode set-up and the decompression.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

from pytest_chvm.base.cache import built_once
from pytest_chvm.guest.kernels.packing import packed_with, unpacked_payload

# Documentation/arch/x86/boot.rst
SETUP_SECTORS, PAYLOAD_OFFSET = 0x1F1, 0x248
# By the choices of init/Kconfig; LZO's has no name here.
PACKED_INSIDE = ("gzip", "xz", "lzma", "bzip2", "zstd", "lz4")


def unpacked_kernel(image: Path, cache: Path) -> Path:
    """Return the ELF kernel inside a bzImage, from the cache; the image itself where it is no bzImage or has no PVH entry."""
    found = image.stat()
    # Device and inode are left out: they differ between the host and the lab.
    key = hashlib.sha256(f"{image}\0{found.st_size}\0{found.st_mtime_ns}".encode("utf-8", "surrogateescape")).hexdigest()[:32]

    def build(directory: Path) -> None:
        kernel = kernel_inside(image)
        if kernel is not None and _has_pvh_entry(kernel):
            (directory / "vmlinux").write_bytes(kernel)

    unpacked = built_once(cache / "vmlinux" / key, build) / "vmlinux"
    return unpacked if unpacked.exists() else image


def kernel_inside(image: Path) -> bytes | None:
    """Return the kernel inside a bzImage; None where it is no bzImage, or packed in a way that is not known."""
    payload = _payload(image)
    return None if payload is None else unpacked_payload(payload)


def is_damaged(image: Path) -> bool:
    """Tell whether the kernel inside a bzImage is packed in a way that is known, and cannot be unpacked."""
    payload = _payload(image)
    return payload is not None and packed_with(payload) in PACKED_INSIDE and unpacked_payload(payload) is None


def _payload(image: Path) -> bytes | None:
    data = image.read_bytes()
    if data[0x202:0x206] != b"HdrS":
        return None
    offset, length = struct.unpack_from("<II", data.ljust(PAYLOAD_OFFSET + 8, b"\0"), PAYLOAD_OFFSET)
    start = (data[SETUP_SECTORS] + 1) * 512 + offset
    return data[start : start + length]


def _has_pvh_entry(kernel: bytes) -> bool:
    """Tell whether an ELF kernel has the note that names its 32-bit entry: owner "Xen", type 18."""
    notes = [struct.pack("<III4s", 4, size, 18, b"Xen\0") for size in (4, 8)]
    return kernel[:4] == b"\x7fELF" and any(note in kernel for note in notes)

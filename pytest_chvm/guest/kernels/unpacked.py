"""The kernel inside a bzImage, unpacked once, so that not every boot does it again.

A VMM enters it at its PVH note (xen/elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY) without the real-mode set-up and the decompression.
"""

from __future__ import annotations

import hashlib
import lzma
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from pytest_chvm.base.cache import built_once

# Documentation/arch/x86/boot.rst
SETUP_SECTORS, PAYLOAD_OFFSET = 0x1F1, 0x248
LARGEST_KERNEL = 512 << 20
LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"


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
    data = image.read_bytes()
    if data[0x202:0x206] != b"HdrS":
        return None
    offset, length = struct.unpack_from("<II", data, PAYLOAD_OFFSET)
    start = (data[SETUP_SECTORS] + 1) * 512 + offset
    payload = data[start : start + length]
    for magic, unpack in FORMATS.items():
        if payload.startswith(magic):
            try:
                return unpack(payload)
            except (ValueError, EOFError, zlib.error, lzma.LZMAError, RuntimeError):
                # A variant that these libraries do not support: the image itself boots.
                return None
    return None


def _gunzip(payload: bytes) -> bytes:
    return zlib.decompressobj(wbits=31).decompress(payload, LARGEST_KERNEL)


def _unxz(payload: bytes) -> bytes:
    return lzma.LZMADecompressor().decompress(payload, LARGEST_KERNEL)


def _unzstd(payload: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj().decompress(payload)


def _unlz4(payload: bytes) -> bytes:
    # The legacy frame (lz4_Frame_format.md): blocks of at most 8 MiB, each with its length before it; the kernel's build
    # appends the unpacked size.
    import lz4.block

    kernel = bytearray()
    position = len(LZ4_LEGACY_MAGIC)
    while position + 4 < len(payload):
        (length,) = struct.unpack_from("<I", payload, position)
        position += 4
        if length > len(payload) - position:
            break
        kernel += lz4.block.decompress(payload[position : position + length], uncompressed_size=8 << 20)
        position += length
    return bytes(kernel)


FORMATS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": _gunzip,
    b"\xfd7zXZ": _unxz,
    b"\x28\xb5\x2f\xfd": _unzstd,
    LZ4_LEGACY_MAGIC: _unlz4,
}


def _has_pvh_entry(kernel: bytes) -> bool:
    """Tell whether an ELF kernel has the note that names its 32-bit entry: owner "Xen", type 18."""
    notes = [struct.pack("<III4s", 4, size, 18, b"Xen\0") for size in (4, 8)]
    return kernel[:4] == b"\x7fELF" and any(note in kernel for note in notes)

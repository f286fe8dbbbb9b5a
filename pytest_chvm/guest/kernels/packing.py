"""The ways in which kernels are compressed, and how each is undone: of files, and of what a bzImage or an EFI zboot image has."""

from __future__ import annotations

import bz2
import lzma
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

LARGEST_KERNEL = 512 << 20
LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"
LZ4_LEGACY_BLOCK = 8 << 20
LZO_MAGIC = b"\x89LZO\0\r\n\x1a\n"
UNLZO_TIMEOUT_S = 60.0
# Documentation of the header: drivers/firmware/efi/libstub/zboot-header.S
ZBOOT_MAGIC, ZBOOT_PAYLOAD = b"zimg", 8


class PackingError(Exception):
    """What is compressed is damaged or cut off, or nothing here can undo it; the message says which."""


def packed_with(head: bytes) -> str | None:
    """Return by which program a file was compressed, by its beginning; None where by none that is known."""
    if head.startswith(LZO_MAGIC):
        return "lzop"
    return next((name for magic, (name, _unpack) in FORMATS.items() if head.startswith(magic)), None)


def is_zboot(head: bytes) -> bool:
    """Tell whether a file is an EFI program that only unpacks the kernel in it (CONFIG_EFI_ZBOOT)."""
    return head[:2] == b"MZ" and head[4:8] == ZBOOT_MAGIC


def unpack(data: bytes, busybox: Callable[[], Path]) -> bytes:
    """Return what is in a compressed file or an EFI zboot image; `busybox` returns what unpacks LZO, for which Python has nothing.

    Raises PackingError where that cannot be had.
    """
    if is_zboot(data):
        offset, length = struct.unpack_from("<II", data.ljust(16, b"\0"), ZBOOT_PAYLOAD)
        payload = data[offset : offset + length]
        if len(payload) < length or not length:
            raise PackingError(f"it is cut off: its header says {offset + length} bytes, and it has {len(data)}")
        return unpack(payload, busybox) if packed_with(payload) else payload
    if data.startswith(LZO_MAGIC):
        return _unlzo(data, busybox())
    if (unpacked := unpacked_payload(data)) is None:
        raise PackingError("it is damaged or cut off")
    return unpacked


def unpacked_payload(payload: bytes) -> bytes | None:
    """Return what is compressed, without what may follow it; None where it is damaged, cut off, or not compressed as is known."""
    for magic, (_name, unpack_format) in FORMATS.items():
        if payload.startswith(magic):
            try:
                return unpack_format(payload)
            except (ValueError, EOFError, OSError, zlib.error, lzma.LZMAError, RuntimeError):
                # A variant that these libraries do not support.
                return None
    return None


def _gunzip(payload: bytes) -> bytes:
    return _whole(zlib.decompressobj(wbits=31), payload)


def _unxz(payload: bytes) -> bytes:
    return _whole(lzma.LZMADecompressor(), payload)


def _bunzip2(payload: bytes) -> bytes:
    return _whole(bz2.BZ2Decompressor(), payload)


def _unlz4(payload: bytes) -> bytes:
    import lz4.frame

    return _whole(lz4.frame.LZ4FrameDecompressor(), payload)


def _whole(decompressor: object, payload: bytes) -> bytes:
    unpacked: bytes = decompressor.decompress(payload, LARGEST_KERNEL)  # type: ignore[attr-defined]
    if not decompressor.eof:  # type: ignore[attr-defined]
        raise EOFError
    return unpacked


def _unzstd(payload: bytes) -> bytes:
    import zstandard

    decompressor = zstandard.ZstdDecompressor().decompressobj()
    try:
        unpacked = decompressor.decompress(payload)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if not decompressor.eof:
        raise EOFError
    return unpacked


def _unlz4_legacy(payload: bytes) -> bytes:
    # lz4_Frame_format.md: blocks, each with its length before it; the kernel's build appends the unpacked size.
    import lz4.block

    kernel = bytearray()
    position = len(LZ4_LEGACY_MAGIC)
    while position + 4 < len(payload):
        (length,) = struct.unpack_from("<I", payload, position)
        position += 4
        if length > len(payload) - position:
            raise EOFError
        kernel += lz4.block.decompress(payload[position : position + length], uncompressed_size=LZ4_LEGACY_BLOCK)
        position += length
    if position + 4 == len(payload) and struct.unpack_from("<I", payload, position)[0] != len(kernel):
        raise EOFError
    return bytes(kernel)


def _unlzo(data: bytes, busybox: Path) -> bytes:
    try:
        done = subprocess.run([busybox, "lzop", "-dc"], input=data, capture_output=True, timeout=UNLZO_TIMEOUT_S, check=True)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()[:200]
        raise PackingError(f"'busybox lzop -d' says {said!r}; is it damaged, or has this BusyBox no lzop?") from error
    except subprocess.TimeoutExpired as error:
        raise PackingError(f"'busybox lzop -d' took longer than {UNLZO_TIMEOUT_S:.0f} s") from error
    return done.stdout


# By magic number: the program's name, and what undoes it, which passes over what follows.
FORMATS: dict[bytes, tuple[str, Callable[[bytes], bytes]]] = {
    b"\x1f\x8b": ("gzip", _gunzip),
    b"\xfd7zXZ\0": ("xz", _unxz),
    b"\x5d\0\0": ("lzma", _unxz),
    b"BZh": ("bzip2", _bunzip2),
    b"\x28\xb5\x2f\xfd": ("zstd", _unzstd),
    b"\x04\x22\x4d\x18": ("lz4", _unlz4),
    LZ4_LEGACY_MAGIC: ("lz4", _unlz4_legacy),
}

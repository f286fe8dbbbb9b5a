"""Executables for the guest that are nothing but a few system calls: what no guest can be relied on to have."""

from __future__ import annotations

import struct

LOAD_ADDRESS = 0x400000


def executable(code: bytes) -> bytes:
    """Return a static x86-64 executable (elf(5)) of position-independent code, which is entered at its first byte."""
    header_size = 64 + 56
    size = header_size + len(code)
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = identity + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, LOAD_ADDRESS + header_size, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, LOAD_ADDRESS, LOAD_ADDRESS, size, size, 0x1000)
    return header + segment + code

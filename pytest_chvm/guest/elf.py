"""Executables for the guest that are nothing but a few system calls: what no guest can be relied on to have."""

from __future__ import annotations

import struct

from pytest_chvm.model import Architecture

LOAD_ADDRESS = 0x400000
# e_machine of elf(5), by the architectures that our programs are written for.
WRITTEN_FOR = {"x86_64": 62, "aarch64": 183}


def executable(arch: Architecture, x86_64: bytes, aarch64: bytes) -> bytes:
    """Return a static executable (elf(5)) of an architecture's position-independent code, which is entered at its first byte."""
    code = {"x86_64": x86_64, "aarch64": aarch64}[arch.name]
    header_size = 64 + 56
    size = header_size + len(code)
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = identity + struct.pack(
        "<HHIQQQIHHHHHH", 2, WRITTEN_FOR[arch.name], 1, LOAD_ADDRESS + header_size, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, LOAD_ADDRESS, LOAD_ADDRESS, size, size, 0x1000)
    return header + segment + code

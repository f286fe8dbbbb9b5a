"""A program for the guest that becomes another one in the root that was made for commands, where that is not the guest's own.

BusyBox's `nsenter`, and the shell that would go to a directory there, each take an emulated guest longer.
"""

from __future__ import annotations

from pytest_chvm.guest import elf
from pytest_chvm.model import Architecture

# Where it finds the mount namespace with that root; `init.sh` and `configure.sh` make it.
NAMESPACE = "/lib/chvm/root.ns"
# enter.S, assembled.
X86_64 = bytes.fromhex(
    "488b1c244c8d6cdc10b802000000488d3d8100000031f631d20f054189c489c7b834010000be000002000f0585c0785a"
    "b8030000004489e70f05b850000000488b7c24100f05b83b000000488b7c2418488d7424184c89ea0f05488d3d470000"
    "0048893c24488d05440000004889442408488d053b0000004889442410b83b0000004889e64c89ea0f05b83c000000bf"
    "7e0000000f052f6c69622f6368766d2f726f6f742e6e73002f62696e2f7368002d630065786563202224302220222440"
    "2200"
)
# Likewise aarch64/enter.S.
AARCH64 = bytes.fromhex(
    "f30340f9f4430091940e138b080780d2600c809201040010020080d2030080d2010000d4f50300aa882180d24100a0d2"
    "010000d4a002f8b7280780d2e00315aa010000d4280680d2e00b40f9010000d4a81b80d2e00f40f9e1630091e20314aa"
    "010000d4000200502102005022020030e00700a9e20b00f9a81b80d2e1030091e20314aa010000d4a80b80d2c00f80d2"
    "010000d42f6c69622f6368766d2f726f6f742e6e73002f62696e2f7368002d6300657865632022243022202224402200"
)


def program(arch: Architecture) -> bytes:
    """Return the program, a static executable for an architecture of `elf.WRITTEN_FOR`.

    Its arguments are a directory, another program's path, and that one's.
    """
    return elf.executable(arch, X86_64, AARCH64)

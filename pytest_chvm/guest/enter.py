"""A program for the guest that becomes another one in the root that was made for commands, where that is not the guest's own.

BusyBox's `nsenter`, and the shell that would go to a directory there, each take an emulated guest longer.
"""

from __future__ import annotations

from pytest_chvm.guest import elf

# Where it finds the mount namespace with that root; `init.sh` and `configure.sh` make it.
NAMESPACE = "/lib/chvm/root.ns"
# enter.S, assembled for x86-64.
CODE = bytes.fromhex(
    "488b1c244c8d6cdc10b802000000488d3d8100000031f631d20f054189c489c7b834010000be000002000f0585c0785a"
    "b8030000004489e70f05b850000000488b7c24100f05b83b000000488b7c2418488d7424184c89ea0f05488d3d470000"
    "0048893c24488d05440000004889442408488d053b0000004889442410b83b0000004889e64c89ea0f05b83c000000bf"
    "7e0000000f052f6c69622f6368766d2f726f6f742e6e73002f62696e2f7368002d630065786563202224302220222440"
    "2200"
)


def program() -> bytes:
    """Return the program, a static x86-64 executable; its arguments are a directory, another program's path, and that one's."""
    return elf.executable(CODE)

"""A program for the guest by which a process that a test has started hears of SIGINT and SIGQUIT.

A shell without job control has its background processes ignore both (POSIX, "Signals and Error Handling"), what they start
does too, and no shell can undo that. `env --default-signal` of coreutils can; BusyBox has nothing that does.
"""

from __future__ import annotations

from pytest_chvm.guest import elf
from pytest_chvm.model import Architecture

# signals.S, assembled.
X86_64 = bytes.fromhex(
    "488b1c244c8d6424104c8d6cdc1031c050505050bf02000000e827000000bf03000000e81d000000b83b000000498b3c"
    "244c89e64c89ea0f05b83c000000bf7f0000000f05b80d000000488d74240831d241ba080000000f05c3"
)
# Likewise aarch64/signals.S.
AARCH64 = bytes.fromhex(
    "f30340f9f4430091950e138bff7fbea9ff7f01a9400080d20b000094600080d209000094a81b80d2800240f9e10314aa"
    "e20315aa010000d4a80b80d2e00f80d2010000d4c81080d2e1030091020080d2030180d2010000d4c0035fd6"
)


def program(arch: Architecture) -> bytes:
    """Return the program, a static executable for an architecture of `elf.WRITTEN_FOR`.

    Its arguments are the path of another one, and that one's.
    """
    return elf.executable(arch, X86_64, AARCH64)

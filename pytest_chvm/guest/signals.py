"""A program for the guest by which a process that a test has started hears of SIGINT and SIGQUIT.

A shell without job control has its background processes ignore both (POSIX, "Signals and Error Handling"), what they start
does too, and no shell can undo that. `env --default-signal` of coreutils can; BusyBox has nothing that does.
"""

from __future__ import annotations

from pytest_chvm.guest import elf

# signals.S, assembled for x86-64.
CODE = bytes.fromhex(
    "488b1c244c8d6424104c8d6cdc1031c050505050bf02000000e827000000bf03000000e81d000000b83b000000498b3c"
    "244c89e64c89ea0f05b83c000000bf7f0000000f05b80d000000488d74240831d241ba080000000f05c3"
)


def program() -> bytes:
    """Return the program, a static x86-64 executable; its arguments are the path of another one, and that one's."""
    return elf.executable(CODE)

"""A program for the built-in guest that sends what a process prints over the console, in place of a loop of the shell's.

That starts three processes for each piece, which takes milliseconds of an emulated guest, and the commands beside it wait for them.
"""

from __future__ import annotations

from pytest_chvm.guest import elf

# Where the console shell looks for it.
PATH = "/lib/chvm/stream"

# stream.S, assembled for x86-64: its code and the string behind it.
CODE = bytes.fromhex(
    "4c8b642410488b7424184531ed0fb60683e830780c456bed0a4101c548ffc6ebec4181fd000001000f871b0100004c89"
    "e34531f642803c3300740f41ffc64183fe640f8701010000ebea4881ec0001010031c031ff488db424000100004489ea"
    "0f0585c0790231c04189c7488dbc24ff000000c6070ab90a00000031d2f7f183c23048ffcf881785c075f04489f14829"
    "cf4889fd4c89e6f3a4b810000000bf01000000be015400004889e20f0585c07523f744240401000000741983642404fe"
    "b810000000bf01000000be025400004889e20f0531c0bf090000004889e6ba010000000f05488d9c24000100004c01fb"
    "b801000000bf010000004889ee4889da4829ea0f054885c07e3f4801c54839dd72de4585ff741631c0bf070000004889"
    "e6ba010000000f05e924ffffffb801000000bf09000000488d3517000000ba010000000f0531ffeb05bf01000000b83c"
    "0000000f050a"
)


def program() -> bytes:
    """Return the program, a static x86-64 executable; shell.sh says what its arguments and descriptors are."""
    return elf.executable(CODE)

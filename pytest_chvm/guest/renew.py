"""A program for the guest that sets its clock and reseeds its random pool: what a clone must do first, and BusyBox cannot.

BusyBox sets a clock to whole seconds only, and what is written to `/dev/urandom` is not used before the pool is next reseeded, up
to a minute later: two clones would draw the same numbers until then.

It is started before the guest is saved, since starting it is what takes an emulated clone longest. It says `waits` and reads a
line: in a clone the host's `call`, which it says again, so that what it is told then is not older than its way to the guest. It
reads that `message`, sets the clock, adds the seed with RNDADDENTROPY and has it used with RNDRESEEDCRNG (random(4), Linux 4.14).
In the guest that was saved, where it goes on, it is sent away with `AWAY`.
"""

from __future__ import annotations

import struct

from pytest_chvm.guest import elf
from pytest_chvm.model import Architecture

SEED_SIZE = 32
# The host's line begins with a token of so many characters.
TOKEN_SIZE = 32
AWAY = b"-".ljust(TOKEN_SIZE + 6) + b"\n"

# renew.S, assembled: its code and the strings behind it.
X86_64 = bytes.fromhex(
    "4881ec80000000b801000000bf01000000488d35c0000000ba060000000f054c8d64240141bd27000000e88c00000080"
    "7c24012d7479c604240ab801000000bf010000004889e6ba280000000f054c8d64244041bd38000000e85d000000b8e3"
    "00000031ff488d7424400f0585c0753fb802000000488d3d6200000031f60f0585c0782b89c7b810000000be03520840"
    "488d5424500f0585c07514b810000000be075200000f0585c0750431ffeb05bf01000000b83c0000000f0531db31c031"
    "ff498d341c4489ea29da0f0585c07edf01c34439eb72e6c377616974730a2f6465762f7572616e646f6d00"
)
# Likewise aarch64/renew.S.
AARCH64 = bytes.fromhex(
    "ff0302d1080880d2200080d261070010c20080d2010000d4f3070091f40480d229000094e00740391fb4007160040054"
    "40018052e0030039080880d2200080d2e1030091020580d2010000d4f3030191140780d21c000094080e80d2000080d2"
    "e1030191010000d4800200b5080780d2600c809241040050020080d2010000d4c001f8b7f30300aaa80380d241030018"
    "e2430191010000d4000100b5a80380d2e00313aae1408a52010000d4600000b5000080d202000014200080d2a80b80d2"
    "010000d4150080d2e80780d2000080d26102158b820215cb010000d41f0000f1cdfeff54b502008bbf0214ebe3feff54"
    "c0035fd60352084077616974730a2f6465762f7572616e646f6d00"
)


def program(arch: Architecture) -> bytes:
    """Return the program, a static executable for an architecture of `elf.WRITTEN_FOR`."""
    return elf.executable(arch, X86_64, AARCH64)


def call(token: str) -> bytes:
    """Return the line that has the program ask for its message, by saying it again after a line's end."""
    line = f"{token} renew\n".encode("ascii")
    if len(line) != len(AWAY):
        raise ValueError(f"a token has {TOKEN_SIZE} characters, not {len(token)}")
    return line


def message(time_ns: int, seed: bytes) -> bytes:
    """Return what the program reads: a `struct timespec`, and a `struct rand_pool_info` with 8 bits of entropy a byte."""
    if len(seed) != SEED_SIZE:
        raise ValueError(f"a seed has {SEED_SIZE} bytes, not {len(seed)}")
    return struct.pack("<qqii", *divmod(time_ns, 10**9), 8 * SEED_SIZE, SEED_SIZE) + seed

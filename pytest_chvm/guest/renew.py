"""A program for the guest that sets its clock and reseeds its random pool: what a clone must do first, and BusyBox cannot.

BusyBox sets a clock to whole seconds only, and what is written to `/dev/urandom` is not used before the pool is next reseeded, up
to a minute later: two clones would draw the same numbers until then. The program says `renew`, so that what it is told is not older
than its way to the guest, reads one message (see `message`), sets the clock, adds the seed with RNDADDENTROPY and has it used with
RNDRESEEDCRNG (random(4), Linux 4.14).
"""

from __future__ import annotations

import struct

SEED_SIZE = 32
LOAD_ADDRESS = 0x400000

# x86-64; system calls in asm/unistd_64.h, requests in linux/random.h.
CODE = bytes.fromhex(
    "4883ec40"  # sub rsp, 64
    "b801000000 bf01000000 488d3580000000 ba06000000 0f05"  # write(1, "renew\n", 6)
    "31db"  # rbx = 0
    "31c0 31ff 488d341c ba38000000 29da 0f05"  # again: read(0, rsp + rbx, 56 - rbx)
    "85c0 7e56"  # 0 or below: fail
    "01c3 83fb38 72e4"  # rbx += it; below 56: again
    "b8e3000000 31ff 4889e6 0f05"  # clock_settime(CLOCK_REALTIME, rsp)
    "85c0 753f"  # not 0: fail
    "b802000000 488d3d45000000 31f6 0f05"  # open("/dev/urandom", O_RDONLY)
    "85c0 782b 89c7"  # below 0: fail
    "b810000000 be03520840 488d542410 0f05"  # ioctl(fd, RNDADDENTROPY, rsp + 16)
    "85c0 7514"  # not 0: fail
    "b810000000 be07520000 0f05"  # ioctl(fd, RNDRESEEDCRNG)
    "85c0 7504 31ff eb05"  # 0: exit(0)
    "bf01000000"  # fail: exit(1)
    "b83c000000 0f05"
)


def program() -> bytes:
    """Return the program, a static x86-64 executable (elf(5))."""
    image = CODE + b"renew\n/dev/urandom\0"
    header_size = 64 + 56
    size = header_size + len(image)
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = identity + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, LOAD_ADDRESS + header_size, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, LOAD_ADDRESS, LOAD_ADDRESS, size, size, 0x1000)
    return header + segment + image


def message(time_ns: int, seed: bytes) -> bytes:
    """Return what the program reads: a `struct timespec`, and a `struct rand_pool_info` with 8 bits of entropy a byte."""
    if len(seed) != SEED_SIZE:
        raise ValueError(f"a seed has {SEED_SIZE} bytes, not {len(seed)}")
    return struct.pack("<qqii", *divmod(time_ns, 10**9), 8 * SEED_SIZE, SEED_SIZE) + seed

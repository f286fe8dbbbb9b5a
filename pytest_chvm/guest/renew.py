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

SEED_SIZE = 32
LOAD_ADDRESS = 0x400000
# The host's line begins with a token of so many characters.
TOKEN_SIZE = 32
AWAY = b"-".ljust(TOKEN_SIZE + 6) + b"\n"

# x86-64; system calls in asm/unistd_64.h, requests in linux/random.h.
CODE = bytes.fromhex(
    "4881ec80000000"  # sub rsp, 128
    "b801000000 bf01000000 488d35c0000000 ba06000000 0f05"  # write(1, "waits\n", 6)
    "4c8d642401 41bd27000000 e88c000000"  # read_all(rsp + 1, 39)
    "807c24012d 7479"  # "-": fail
    "c604240a b801000000 bf01000000 4889e6 ba28000000 0f05"  # write(1, "\n" and the line, 40)
    "4c8d642440 41bd38000000 e85d000000"  # read_all(rsp + 64, 56)
    "b8e3000000 31ff 488d742440 0f05"  # clock_settime(CLOCK_REALTIME, rsp + 64)
    "85c0 753f"  # not 0: fail
    "b802000000 488d3d62000000 31f6 0f05"  # open("/dev/urandom", O_RDONLY)
    "85c0 782b 89c7"  # below 0: fail
    "b810000000 be03520840 488d542450 0f05"  # ioctl(fd, RNDADDENTROPY, rsp + 80)
    "85c0 7514"  # not 0: fail
    "b810000000 be07520000 0f05"  # ioctl(fd, RNDRESEEDCRNG)
    "85c0 7504 31ff eb05"  # 0: exit(0)
    "bf01000000"  # fail: exit(1)
    "b83c000000 0f05"
    "31db"  # read_all: rbx = 0
    "31c0 31ff 498d341c 4489ea 29da 0f05"  # again: read(0, r12 + rbx, r13 - rbx)
    "85c0 7edf"  # 0 or below: fail
    "01c3 4439eb 72e6 c3"  # rbx += it; below r13: again
)


def program() -> bytes:
    """Return the program, a static x86-64 executable (elf(5))."""
    image = CODE + b"waits\n/dev/urandom\0"
    header_size = 64 + 56
    size = header_size + len(image)
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = identity + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, LOAD_ADDRESS + header_size, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, LOAD_ADDRESS, LOAD_ADDRESS, size, size, 0x1000)
    return header + segment + image


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

"""A program for the guest by which bytes go in and out faster than over its console: over a TCP or vsock connection to it.

It reads a `message` from its standard input, listens at the address in it and says `ready`. The first that connects and says the
token hears it again, and from then on is the standard input and output of what the program is given to become. Who says anything
else, or nothing within 5 s, is sent away. It ends with 1 where there is no message, with 2 where the address cannot be had.
"""

from __future__ import annotations

import socket
import struct

from pytest_chvm.guest import elf
from pytest_chvm.model import Architecture

TOKEN_SIZE = 32
# It ends with this where the guest refuses the address.
REFUSED = 2
# Where the built-in guest has it.
PATH = "/lib/chvm/carry"
# Puts the program that is its input where the guest runs programs from, unless it has it, and says where.
INSTALL = f"""\
for program in {PATH} ""; do
    $program </dev/null >/dev/null 2>&1
    [ $? = 1 ] && [ "$program" ] && echo $program && exit
done
for place in /run /tmp /var/tmp /root /dev; do
    directory=$(mktemp -d $place/chvm.XXXXXX 2>/dev/null) || continue
    if [ "$program" ]; then cp $program $directory/carry; else cat >$directory/carry; fi
    program=$directory/carry
    chmod 700 $program
    $program </dev/null >/dev/null 2>&1
    [ $? = 1 ] && echo $program && exit
done
exit 3
"""

# carry.S, assembled: its code and the string behind it.
X86_64 = bytes.fromhex(
    "488b1c244c8d6424104c8d6cdc104881ec8000000031ff4889e641be38000000e8560100000f853d010000b829000000"
    "8b3c24be0100000031d20f0585c00f882b0100004189c7c744246001000000b8360000004489ffbe01000000ba020000"
    "004c8d54246041b8040000000f05b8310000004489ff488d7424088b5424040f0585c00f85e6000000b8320000004489"
    "ffbe080000000f0585c00f85cf000000b801000000bf01000000488d3513010000ba060000000f05b82b0000004489ff"
    "31f631d20f0585c00f889a00000089c5bf05000000e8bd00000089ef488d74244041be20000000e88f000000756c488d"
    "742418488d7c2440b920000000f3a6755931ffe88f000000b80100000089ef488d742418ba200000000f05b821000000"
    "89ef31f60f05b82100000089efbe010000000f05b80300000089ef0f05b8030000004489ff0f05b83b000000498b3c24"
    "4c89e64c89ea0f05eb0eb80300000089ef0f05e950ffffffbf01000000eb05bf02000000b83c0000000f05b800000000"
    "4489f20f0585c07e094801c64129c675eac34883fc00c348897c246848c744247000000000b83600000089efbe010000"
    "00ba140000004c8d54246841b8100000000f05c372656164790a"
)
# Likewise aarch64/carry.S.
AARCH64 = bytes.fromhex(
    "f30340f9f4430091950e138bff0302d1160080d2f7030091180780d260000094580b00b5c81880d2e00340b9210080d2"
    "020080d2010000d4c00af8b7f90300aa21008052e16300b9081a80d2210080d2420080d2e3830191840080d2010000d4"
    "081980d2e00319aae1230091e20740b9010000d4e00800b5281980d2e00319aa010180d2010000d4400800b5080880d2"
    "200080d2c10a0010c20080d2010000d4481980d2e00319aa010080d2020080d2010000d4a006f8b7f60300aaa90080d2"
    "42000094f7030191180480d234000094580500b5e08741a9e20f44a9000002ca210003ca000001aae18b42a9e31345a9"
    "210003ca420004ca210002aa000001aac00300b5090080d230000094080880d2e00316aae1630091020480d2010000d4"
    "080380d2e00316aa010080d2020080d2010000d4080380d2e00316aa210080d2020080d2010000d4280780d2e00316aa"
    "010000d4280780d2e00319aa010000d4a81b80d2800240f9e10314aae20315aa010000d405000014280780d2e00316aa"
    "010000d4c7ffff17200080d202000014400080d2a80b80d2010000d4e80780d2e00316aae10317aae20318aa010000d4"
    "1f0000f18d000054f702008b180300ebe1feff54c0035fd6e97f06a9081a80d2e00316aa210080d2820280d2e3830191"
    "040280d2010000d4c0035fd672656164790a"
)


def program(arch: Architecture) -> bytes:
    """Return the program, a static executable for an architecture of `elf.WRITTEN_FOR`.

    Its arguments are the path of what it becomes, and that one's.
    """
    return elf.executable(arch, X86_64, AARCH64)


def tcp_message(port: int, token: bytes) -> bytes:
    """Return what has it listen at a TCP port of all of the guest's IPv4 addresses (ip(7))."""
    return _message(socket.AF_INET, struct.pack("=HH", socket.AF_INET, socket.htons(port)), token)


def vsock_message(port: int, token: bytes) -> bytes:
    """Return what has it listen at a vsock port (vsock(7), VMADDR_CID_ANY)."""
    return _message(socket.AF_VSOCK, struct.pack("=HHII", socket.AF_VSOCK, 0, port, 0xFFFFFFFF), token)


def _message(domain: int, address: bytes, token: bytes) -> bytes:
    if len(token) != TOKEN_SIZE:
        raise ValueError(f"a token has {TOKEN_SIZE} bytes, not {len(token)}")
    return struct.pack("=II16s", domain, 16, address) + token

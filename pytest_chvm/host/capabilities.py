"""Which capabilities this process has: root in a container or a user namespace may have few, or none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

# linux/capability.h
NUMBERS = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_FOWNER": 3,
    "CAP_FSETID": 4,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SETPCAP": 8,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_CHROOT": 18,
    "CAP_SETFCAP": 31,
}


def missing(names: Iterable[str]) -> list[str]:
    """Return those of these capabilities that are not in effect (capabilities(7))."""
    effective = next(line for line in Path("/proc/thread-self/status").read_text().splitlines() if line.startswith("CapEff:"))
    mask = int(effective.split()[1], 16)
    return [name for name in names if not mask >> NUMBERS[name] & 1]

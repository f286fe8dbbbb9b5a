"""Values that several kinds of data have: names, paths, MAC addresses."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from pytest_chvm.base.choices import is_kernel_word
from pytest_chvm.errors import InvalidConfigError

StrPath = str | os.PathLike[str]

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
MAC_PATTERN = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def as_path(key: str, value: object) -> Path:
    """Return `value` as an absolute Path; raises InvalidConfigError where it cannot be one."""
    if isinstance(value, bytes):
        value = os.fsdecode(value)
    if not isinstance(value, str | os.PathLike):
        raise InvalidConfigError(f"{key}={value!r}, expected a path (str or os.PathLike)")
    text = os.fsdecode(value)
    if not text or "\0" in text:
        raise InvalidConfigError(f"{key}={text!r} cannot be a path: it is empty or has a NUL")
    return Path(os.path.abspath(text))


def as_kernel(key: str, value: object) -> Path:
    """Return `value` as an absolute Path, as a relative one where it is a word for a kernel; raises what `as_path` does."""
    return Path(value) if isinstance(value, str | Path) and is_kernel_word(str(value)) else as_path(key, value)


def checked_mac(value: object) -> str:
    """Return a MAC address in lower case; raises InvalidConfigError where it is none, or is multicast."""
    mac = value.lower() if isinstance(value, str) else ""
    if not MAC_PATTERN.fullmatch(mac):
        raise InvalidConfigError(f"mac={value!r} is no MAC address: expected six bytes like 52:54:00:12:34:56")
    if int(mac[:2], 16) & 1:
        raise InvalidConfigError(f"mac={value!r} is a multicast address: the first byte of a NIC's must be even")
    if mac == "00:00:00:00:00:00":
        raise InvalidConfigError(f"mac={value!r} is no NIC's address: it is all zeros")
    return mac


def mac_for(vm_name: str, index: int) -> str:
    """Return the MAC of a VM's NIC number `index`, the same on every run.

    QEMU's prefix and the first three bytes of the SHA-256 of the name (`NAME#1` for the second NIC).
    """
    key = vm_name if index == 0 else f"{vm_name}#{index}"
    digest = hashlib.sha256(key.encode()).digest()
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def check_port(port: object, highest: int, vm_name: str) -> None:
    """Raise InvalidConfigError where a port is no whole number from 1 to `highest`."""
    if isinstance(port, bool) or not isinstance(port, int) or not 0 < port <= highest:
        raise InvalidConfigError(f"VM {vm_name!r}: port={port!r}: expected 1 to {highest}", vm_name=vm_name)

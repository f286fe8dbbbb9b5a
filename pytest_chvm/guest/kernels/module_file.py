"""One kernel module, a file on the host: what it says of itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.guest.kernels.modules import decompressed, dependencies

NAME = re.compile(rb"\0name=([A-Za-z0-9_-]{1,55})\0")
RELEASE = re.compile(rb"\0vermagic=(\S{1,64})")


@dataclass(frozen=True, slots=True)
class ModuleFile:
    """What is in a module's `.modinfo` (modinfo(8)), and the plain ELF file, `data`.

    `release` is that of the kernel that it was built for, `needs` are the modules that come before it.
    """

    name: str
    release: str
    needs: tuple[str, ...]
    data: bytes


def read_module(file: Path) -> ModuleFile:
    """Return what a module's file says of itself; raises InvalidConfigError where it is none."""
    data = decompressed(file)
    name, release = NAME.search(data), RELEASE.search(data)
    if not data.startswith(b"\x7fELF") or name is None or release is None:
        raise InvalidConfigError(
            f"{str(file)!r} is no kernel module: expected an ELF file (.ko, also compressed) that says its name and vermagic in "
            ".modinfo; build it against the guest's kernel with its kbuild"
        )
    return ModuleFile(name[1].decode(), release[1].decode(errors="replace"), tuple(dependencies(data)), data)

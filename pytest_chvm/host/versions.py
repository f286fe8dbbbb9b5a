"""What each version of a program that we start is too old for: one table, for decisions and for what people are told.

A version is read once, from what the program says of itself (`host/binaries.py`). A program that names none is taken for a new one:
what it lacks it says itself when it is started.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from pytest_chvm.errors import InvalidConfigError, MissingRequirementError
from pytest_chvm.host.binaries import Binary

# By what the first line of `--version` begins with. The C virtiofsd's is a line about FUSE, or "virtiofsd version 7.2.0".
PROGRAMS = {
    "cloud-hypervisor": re.compile(r"cloud-hypervisor\b"),
    "qemu": re.compile(r"QEMU emulator version\b"),
    "virtiofsd (C)": re.compile(r"virtiofsd version\b|.*\bFUSE\b"),
    "virtiofsd": re.compile(r"virtiofsd\b"),
}


@dataclass(frozen=True, slots=True)
class Need:
    """Something that a program has since a version, and what it is needed for, in words."""

    program: str
    since: tuple[int, int]
    what: str


class Feature(Enum):
    """What not every version has that distributions ship."""

    # The first with on-demand restore, vsock reset on restore and virtio-fs restore.
    CLONES_OF_CLOUD_HYPERVISOR = Need("cloud-hypervisor", (52, 0), "snapshots with vsock and shared dirs, which clones are made of")
    # docs/about/removed-features and qapi/run-state.json: `set-action` and the boolean spelling `server=on`.
    QEMU_OPTIONS = Need("qemu", (6, 0), "the options that it is started with, and reboots (set-action)")
    READ_ONLY_SHARES = Need("virtiofsd", (1, 13), "--readonly")


def program_of(binary: Binary) -> str | None:
    """Return which of `PROGRAMS` an executable is, whatever its name; None for one that it does not say."""
    return next((program for program, pattern in PROGRAMS.items() if pattern.match(binary.version)), None)


def version_of(binary: Binary) -> tuple[int, int] | None:
    """Return a program's version, its first two numbers; None where it says none."""
    found = re.search(r"(?<![\w.])v?(\d{1,6})\.(\d{1,6})", binary.version)
    return (int(found[1]), int(found[2])) if found else None


def check_program(binary: Binary, program: str, instead: str) -> None:
    """Raise InvalidConfigError where an executable says that it is another program than `program`; `instead` says what to do."""
    found = program_of(binary)
    if found is not None and found != program:
        raise InvalidConfigError(f"{binary.path} is no {program}: it says {binary.version!r}; {instead}")


def lacks(binary: Binary, feature: Feature) -> bool:
    """Tell whether a program is known to be too old for something."""
    version = version_of(binary)
    return version is not None and version < feature.value.since


def require(binary: Binary, feature: Feature, install: str) -> None:
    """Raise MissingRequirementError where a program is too old; `install` says where a newer one is from."""
    if lacks(binary, feature):
        need = feature.value
        raise MissingRequirementError(
            f"{binary.path} is {binary.version!r}: {need.program} v{'.'.join(map(str, need.since))} or newer is needed for "
            f"{need.what}; {install}"
        )

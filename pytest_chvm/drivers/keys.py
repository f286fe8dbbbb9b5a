"""What tells one program or file of the host's from another, without reading it: for the keys of templates."""

from __future__ import annotations

import os
from pathlib import Path

from pytest_chvm.host.binaries import Binary


def binary_key(binary: Binary) -> list[str]:
    """Return what tells one build of a program from another, also where all files have one time, or a link leads to another."""
    return [binary.version, *file_key(binary.path)]


def file_key(path: Path) -> list[str]:
    """Return what tells a file from another that was put in its place, without reading it."""
    found = path.stat()
    place = os.path.realpath(path)
    return [place, *(str(value) for value in (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))]

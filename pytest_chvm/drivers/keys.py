"""Identities of the host's programs and files, for the keys of templates, without reading the files."""

from __future__ import annotations

import os
from pathlib import Path

from pytest_chvm.host.binaries import Binary


def binary_key(binary: Binary) -> list[str]:
    """Return the identity of a program's build; holds where all files have the same time, and where a link is changed."""
    return [binary.version, *file_key(binary.path)]


def file_key(path: Path) -> list[str]:
    """Return the identity of a file; it changes when another file is put in its place."""
    found = path.stat()
    place = os.path.realpath(path)
    return [place, *(str(value) for value in (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))]

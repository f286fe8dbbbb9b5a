"""A guest's memory as a file: mapped copy-on-write by clones, or copied for those that have to share it with virtiofsd."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

COPY_NAME = "guest-memory"


@dataclass(frozen=True, slots=True)
class Memory:
    """A guest's memory as a file: written by the guest where it is `shared`, else only read, copy-on-write."""

    path: str
    shared: bool


def copied_to_memory(file: Path) -> int:
    """Return a descriptor of an anonymous file with the content of `file`."""
    copy = os.memfd_create(COPY_NAME, os.MFD_CLOEXEC)
    copy_sparse(file, copy)
    return copy


def copy_sparse(file: Path, copy: int) -> None:
    """Copy a file's content to an empty one that is open, leaving holes out."""
    with file.open("rb") as source:
        size = os.fstat(source.fileno()).st_size
        os.truncate(copy, size)
        position = 0
        while position < size:
            try:
                start = os.lseek(source.fileno(), position, os.SEEK_DATA)
            except OSError:
                # ENXIO: nothing but a hole is left.
                break
            position = os.lseek(source.fileno(), start, os.SEEK_HOLE)
            os.lseek(copy, start, os.SEEK_SET)
            while start < position:
                start += os.sendfile(copy, source.fileno(), start, position - start)


def inherited_memory(pid: int) -> Path | None:
    """Return the guest's memory among a VMM's descriptors, where that is a copy of ours (`/proc/PID/fd/N`)."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        if os.fspath(fd.readlink()).startswith(f"/memfd:{COPY_NAME}"):
            return fd
    return None

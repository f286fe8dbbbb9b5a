"""A guest's memory as a file: mapped copy-on-write by clones, or copied for those that have to share it with virtiofsd."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pytest_chvm.base.extents import data_extents

COPY_NAME = "guest-memory"


@dataclass(frozen=True, slots=True)
class Memory:
    """A guest's memory as a file: written by the guest where it is `shared`, else only read, copy-on-write."""

    path: str
    shared: bool


def copied_to_memory(file: Path) -> int:
    """Return a descriptor of an anonymous file with the content of `file`."""
    copy = os.memfd_create(COPY_NAME, os.MFD_CLOEXEC)
    try:
        copy_sparse(file, copy)
    except BaseException:
        # It is as large as the guest's memory, and nothing else would close it.
        os.close(copy)
        raise
    return copy


def copy_sparse(file: Path, copy: int) -> None:
    """Copy a file's content to an empty one that is open, leaving holes out."""
    with file.open("rb") as source:
        os.truncate(copy, os.fstat(source.fileno()).st_size)
        for start, end in data_extents(source.fileno()):
            os.lseek(copy, start, os.SEEK_SET)
            position = start
            while position < end:
                position += os.sendfile(copy, source.fileno(), position, end - position)


def copy_data(file: Path, copy: Path) -> None:
    """Copy a file to a new one that has none of its holes, and is as much shorter."""
    with file.open("rb") as source, copy.open("wb") as target:
        for start, end in data_extents(source.fileno()):
            position = start
            while position < end:
                sent = os.sendfile(target.fileno(), source.fileno(), position, end - position)
                if sent == 0:
                    # The file was truncated meanwhile.
                    break
                position += sent


def inherited_memory(pid: int) -> Path | None:
    """Return the guest's memory among a VMM's descriptors, where that is a copy of ours (`/proc/PID/fd/N`)."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        # A VMM that is starting closes some of them meanwhile.
        with suppress(FileNotFoundError):
            if os.fspath(fd.readlink()).startswith(f"/memfd:{COPY_NAME}"):
                return fd
    return None

"""A directory tree of the host's as tar archives for a guest, and where its files have data."""

from __future__ import annotations

import io
import os
import shlex
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from pytest_chvm.base.extents import data_extents

PIECE = 1 << 20
BLOCK = 4096
AT_ONCE = 200


@dataclass(frozen=True, slots=True)
class Tree:
    """What is put to a directory of the guest's, whose name is quoted; `left` says what is left out of it."""

    source: Path
    directory: str
    left: list[str]
    xattrs: bool

    @property
    def unpack(self) -> str:
        """The command that unpacks an archive there."""
        keep = " --xattrs --xattrs-include='*' --warning=no-unknown-keyword" if self.xattrs else ""
        return f"tar{keep} -xpf - -C {self.directory}"

    @property
    def format(self) -> Literal[1, 2]:
        """The format of its archives: tarfile.PAX_FORMAT with extended attributes, else GNU_FORMAT."""
        return 2 if self.xattrs else 1

    def is_large(self) -> bool:
        """Tell whether it has more than a MiB of data."""
        size = 0
        for path in _walk(self.source):
            size += os.lstat(path).st_blocks * 512
            if size > PIECE:
                return True
        return False

    def members(self, tar: tarfile.TarFile) -> Iterator[tuple[Path, tarfile.TarInfo, os.stat_result]]:
        """Yield each file with its header; `tar` has to be one object for all, since it recognises hard links among them."""
        for path in _walk(self.source):
            name = os.path.join("chvm-put", os.path.relpath(path, self.source)) if path != self.source else "chvm-put"
            member = tar.gettarinfo(path, name)
            if member is None:
                self.left.append(f"{os.path.relpath(path, self.source)} is a socket")
                continue
            # Owners by number: the guest has other names.
            member.uname = member.gname = ""
            if self.xattrs:
                member.pax_headers = {**member.pax_headers, **_xattrs(path)}
            yield path, member, os.lstat(path)

    def place(self, member: tarfile.TarInfo) -> str:
        """Return where a file is in the guest, quoted."""
        return f"{self.directory}/{shlex.quote(member.name)}"

    def touches(self, directories: list[tuple[str, int]]) -> Iterator[str]:
        """Yield the commands that give directories their times: last, since adding files changes them, and the innermost first."""
        touches = [f"touch -d @{mtime_s} {place}\n" for place, mtime_s in reversed(directories)]
        for start in range(0, len(touches), AT_ONCE):
            yield "".join(touches[start : start + AT_ONCE])

    def steps(self) -> Iterator[tuple[str, bytes]]:
        """Yield the commands that make it, each with its input, of about a MiB."""
        archive = bytearray()
        directories = []
        for path, member, status in self.members(tarfile.TarFile(fileobj=io.BytesIO(), mode="w", format=self.format)):
            apart = member.isreg() and (member.size > PIECE or status.st_blocks * 512 < member.size)
            size, member.size = member.size, 0 if apart else member.size
            archive += member.tobuf(self.format, "utf-8", "surrogateescape")
            if member.isdir():
                directories.append((self.place(member), int(status.st_mtime)))
            elif member.isreg() and not apart:
                with path.open("rb") as file:
                    archive += file.read(size).ljust(-size % 512 + size, b"\0")
            if len(archive) >= PIECE or apart:
                yield self.unpack, _ended(archive)
                archive.clear()
            if apart:
                with path.open("rb") as file:
                    yield from _put_data(file, size, int(status.st_mtime), self.place(member))
        yield self.unpack, _ended(archive)
        for script in self.touches(directories):
            yield script, b""


def _xattrs(path: Path) -> dict[str, str]:
    """Return the extended attributes of a file as headers of an archive (star's "SCHILY.xattr", which GNU tar reads)."""
    names = os.listxattr(path, follow_symlinks=False)
    return {
        f"SCHILY.xattr.{name}": os.getxattr(path, name, follow_symlinks=False).decode(errors="surrogateescape") for name in names
    }


def _walk(top: Path) -> Iterator[Path]:
    yield top
    if top.is_dir() and not top.is_symlink():
        for path in sorted(top.iterdir()):
            yield from _walk(path)


def _ended(archive: bytearray) -> bytes:
    return bytes(archive) + bytes(1024)


def _put_data(file: BinaryIO, size: int, mtime_s: int, place: str) -> Iterator[tuple[str, bytes]]:
    """Yield the commands that write a file's data where it has some, and its length."""
    yield f"truncate -s {size} {place}", b""
    for start, end in data_extents(file.fileno(), size):
        for offset in range(start // BLOCK * BLOCK, end, PIECE):
            piece = os.pread(file.fileno(), min(PIECE, end - offset), offset)
            yield f"dd of={place} bs={BLOCK} seek={offset // BLOCK} conv=notrunc 2>/dev/null", piece
    yield f"touch -d @{mtime_s} {place}", b""

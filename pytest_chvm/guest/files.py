"""Files into a guest over its shell, in pieces of a MiB: neither side holds more of them in its memory.

Small files go as tar archives; large files, files with holes and files whose stated size is wrong (/proc) go one by one.
"""

from __future__ import annotations

import io
import os
import shlex
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from pytest_chvm.errors import InvalidConfigError, UnsupportedError, VmError, VmIOError
from pytest_chvm.guest.carried import BLOCK, PIECE, Carry, data_of, put_carried
from pytest_chvm.model import CommandResult

Run = Callable[[str, bytes | None], CommandResult]


AT_ONCE = 200


def read(run: Run, path: str) -> bytes:
    """Return what is in a file of the guest's. Raises VmIOError where it cannot be read, or has more than 256 MiB."""
    _check_path(path)
    done = run(f"cat <{shlex.quote(path)}", None)
    if done.returncode != 0:
        raise VmIOError(f"{path!r} could not be read in the guest: {done.stderr.strip()[:500]}")
    return done.stdout_bytes


def write(run: Run, path: str, data: bytes) -> None:
    """Write a file of the guest's in place. Raises VmIOError where that fails; a file that was not there before is removed then."""
    _check_path(path)
    place = shlex.quote(path)
    done = run(f'[ -e {place} ] || new=1; cat >{place} || {{ status=$?; [ "$new" ] && rm -f {place}; exit $status; }}', data)
    if done.returncode != 0:
        raise VmIOError(f"{path!r} could not be written in the guest: {done.stderr.strip()[:500]}")


def _check_path(path: str) -> None:
    if not isinstance(path, str) or not path or "\0" in path:
        raise InvalidConfigError(f"path {path!r}: expected that of a file of the guest's")


def put(run: Run, source: Path, destination: str, *, carry: Carry | None = None, xattrs: bool = False) -> None:
    """Copy a file or a directory tree of the host's to `destination` in the guest.

    A destination that ends with "/" or is a directory takes it under its own name. Owners (by number), modes, times to the second,
    holes and links are kept, and with `xattrs` extended attributes; a link that is itself the source is followed. `carry` is a
    faster way for more than a MiB. Raises InvalidConfigError where there is no source, or it is a socket; UnsupportedError where
    the guest's tar keeps no extended attributes; VmIOError where the guest cannot take it, and after the rest of a tree was put,
    naming its sockets.
    """
    if not source.exists():
        why = f"is a link to {str(source.readlink())!r}, which is not there" if source.is_symlink() else "does not exist"
        raise InvalidConfigError(f"{str(source)!r} {why}: there is nothing to put into the guest")

    if source.is_socket():
        raise InvalidConfigError(
            f"{str(source)!r} is a socket, which cannot be put into the guest: it is the process that listens there"
        )
    if xattrs:
        require_gnu_tar(run)
    left: list[str] = []

    def check(returncode: int | None, stderr: str) -> None:
        if returncode != 0:
            raise VmIOError(f"{str(source)!r} could not be put to {destination!r} in the guest: {stderr.strip()[:500]}")

    def must(script: str, data: bytes | None = None) -> str:
        done = run(script, data)
        check(done.returncode, done.stderr)
        return done.stdout

    # Unpacked beside its place and moved there, so that the name in the archive need not be the one it gets.
    places = must(
        f"set -e; dst={shlex.quote(destination)}\n"
        'case $dst in */) mkdir -p "$dst";; esac\n'
        f'[ -d "$dst" ] && dst=$dst/{shlex.quote(source.name)}\n'
        '[ ! -d "$dst" ] || { echo "$dst: is a directory" >&2; exit 1; }\n'
        'dir=$(dirname "$dst"); mkdir -p "$dir"; tmp=$(mktemp -d "$dir/.chvm.XXXXXX"); printf "%s\\0%s" "$tmp" "$dst"'
    )
    directory, place = (shlex.quote(part) for part in places.split("\0", 1))
    tree = Tree(Path(os.path.realpath(source)), directory, left, xattrs)
    try:
        if carry is None or not tree.is_large() or not put_carried(tree, carry, must, check):
            for script, data in tree.steps():
                must(script, data)
        must(f"mv -f {directory}/chvm-put {place}")
    finally:
        with suppress(VmError):
            run(f"rm -rf {directory}", None)
    if left:
        raise VmIOError(f"{str(source)!r} was put to {destination!r}, but not all of it: {'; '.join(left)[:2000]}")


def require_gnu_tar(run: Run) -> None:
    """Raise UnsupportedError where the guest's tar keeps no extended attributes."""
    if run("tar --version 2>/dev/null | grep -q GNU", None).returncode != 0:
        raise UnsupportedError(
            "xattrs=True: the guest's tar keeps no extended attributes (BusyBox's does not): use a guest with GNU tar"
        )


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
    for start, end in data_of(file.fileno(), size):
        for offset in range(start // BLOCK * BLOCK, end, PIECE):
            piece = os.pread(file.fileno(), min(PIECE, end - offset), offset)
            yield f"dd of={place} bs={BLOCK} seek={offset // BLOCK} conv=notrunc 2>/dev/null", piece
    yield f"touch -d @{mtime_s} {place}", b""

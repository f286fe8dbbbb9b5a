"""Files into and out of a guest over its shell, in pieces of a MiB: neither side holds more of them in its memory.

Small files go as tar archives; large files, files with holes and files whose stated size is wrong (/proc) go one by one.
"""

from __future__ import annotations

import io
import os
import shlex
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from pytest_chvm.errors import InvalidConfigError, VmError, VmIOError
from pytest_chvm.model import CommandResult

Run = Callable[[str, bytes | None], CommandResult]

PIECE = 1 << 20
BLOCK = 4096
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


def put(run: Run, source: Path, destination: str) -> None:
    """Copy a file or a directory tree of the host's to `destination` in the guest.

    A destination that ends with "/" or is a directory takes it under its own name. Owners (by number), modes, times to the second,
    holes and links are kept; a link that is itself the source is followed. Raises InvalidConfigError where there is no source, or
    it is a socket; VmIOError where the guest cannot take it, and after the rest of a tree was put, naming its sockets.
    """
    if not source.exists():
        why = f"is a link to {str(source.readlink())!r}, which is not there" if source.is_symlink() else "does not exist"
        raise InvalidConfigError(f"{str(source)!r} {why}: there is nothing to put into the guest")

    if source.is_socket():
        raise InvalidConfigError(
            f"{str(source)!r} is a socket, which cannot be put into the guest: it is the process that listens there"
        )
    left: list[str] = []

    def must(script: str, data: bytes | None = None) -> str:
        done = run(script, data)
        if done.returncode != 0:
            raise VmIOError(f"{str(source)!r} could not be put to {destination!r} in the guest: {done.stderr.strip()[:500]}")
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
    try:
        for script, data in _put_steps(Path(os.path.realpath(source)), directory, left):
            must(script, data)
        must(f"mv -f {directory}/chvm-put {place}")
    finally:
        with suppress(VmError):
            run(f"rm -rf {directory}", None)
    if left:
        raise VmIOError(f"{str(source)!r} was put to {destination!r}, but not all of it: {'; '.join(left)[:2000]}")


def _put_steps(source: Path, directory: str, left: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the commands that make a tree in a directory of the guest's, each with its input; `left` says what is left out."""
    unpack = f"tar -xpf - -C {directory}"
    archive = bytearray()
    touches = []
    # One object for all files, since it recognises hard links among those it has seen.
    tar = tarfile.TarFile(fileobj=io.BytesIO(), mode="w", format=tarfile.GNU_FORMAT)
    for path in _walk(source):
        name = os.path.join("chvm-put", os.path.relpath(path, source)) if path != source else "chvm-put"
        member = tar.gettarinfo(path, name)
        if member is None:
            left.append(f"{os.path.relpath(path, source)} is a socket")
            continue
        # Owners by number: the guest has other names.
        member.uname = member.gname = ""
        status = os.lstat(path)
        apart = member.isreg() and (member.size > PIECE or status.st_blocks * 512 < member.size)
        size, member.size = member.size, 0 if apart else member.size
        header = member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        archive += header
        if member.isdir():
            touches.append(f"touch -d @{int(status.st_mtime)} {directory}/{shlex.quote(name)}\n")
        elif member.isreg() and not apart:
            with path.open("rb") as file:
                archive += file.read(size).ljust(-size % 512 + size, b"\0")
        if len(archive) >= PIECE or apart:
            yield unpack, _ended(archive)
            archive.clear()
        if apart:
            with path.open("rb") as file:
                yield from _put_data(file, size, int(status.st_mtime), f"{directory}/{shlex.quote(name)}")
    yield unpack, _ended(archive)
    # Directories get their times last: adding files changes them.
    for start in range(0, len(touches), AT_ONCE):
        yield "".join(touches[::-1][start : start + AT_ONCE]), b""


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
    for start, end in _data(file.fileno(), size):
        for offset in range(start // BLOCK * BLOCK, end, PIECE):
            piece = os.pread(file.fileno(), min(PIECE, end - offset), offset)
            yield f"dd of={place} bs={BLOCK} seek={offset // BLOCK} conv=notrunc 2>/dev/null", piece
    yield f"touch -d @{mtime_s} {place}", b""


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield where a file has data, from and to (lseek(2), SEEK_DATA)."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = min(size, os.lseek(fd, start, os.SEEK_HOLE))
        except OSError:
            # Nothing but a hole is left.
            return
        yield start, end

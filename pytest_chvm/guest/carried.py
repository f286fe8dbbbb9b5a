"""Files into a guest by a faster way than its console: one archive for all, and files with holes one by one."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self, cast

from pytest_chvm.base.extents import data_extents
from pytest_chvm.errors import VmIOError
from pytest_chvm.guest.tree import BLOCK, PIECE, Tree

RUNS_AT_ONCE = 200
READ_SIZE = 1 << 18


class Stream(Protocol):
    """A command that runs in the guest, by a faster way than its console; a context manager that ends it."""

    def __enter__(self) -> Self:
        """Return itself."""

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None, /) -> None:
        """End it where it still runs."""

    def send(self, data: bytes | memoryview) -> None:
        """Send bytes to its standard input; raises ConnectionError where it takes no more."""

    def receive(self, size: int = ...) -> bytes:
        """Block until something of its standard output has come, up to so many bytes of it; empty at the end."""

    def end(self) -> tuple[int | None, str]:
        """End its standard input and block until it has ended; returns its status and standard error."""


# Starts a script in the guest; None where nothing is faster than the console.
Carry = Callable[[str], Stream | None]


def put_carried(tree: Tree, carry: Carry, must: Callable[[str], object], check: Callable[[int | None, str], None]) -> bool:
    """Put a tree to the guest; returns False, with nothing done, where nothing carries it.

    `must` runs a script in the guest, `check` looks at the status and the standard error of one that has ended; both raise.
    """
    stream = carry(f"exec {tree.unpack}")
    if stream is None:
        return False
    directories = []
    apart = []
    with stream:
        try:
            # The stubs ask for more than what is used of a stream's file.
            archive: Any = _Writer(stream)
            with tarfile.open(mode="w|", fileobj=archive, format=tree.format, bufsize=PIECE) as tar:
                for path, member, status in tree.members(tar):
                    if member.isdir():
                        directories.append((tree.place(member), int(status.st_mtime)))
                    sparse = status.st_blocks * 512 < member.size
                    # BusyBox's tar takes small bites: large files go faster one by one. A write would lose a file its capabilities.
                    if member.isreg() and (sparse or (member.size > PIECE and not tree.xattrs)):
                        apart.append((_put_with_holes if sparse else _put_whole, path, tree.place(member), int(status.st_mtime)))
                        member.size = 0
                    if member.isreg() and member.size:
                        with path.open("rb") as file:
                            tar.addfile(member, cast("BinaryIO", _Padded(file)))
                    else:
                        tar.addfile(member)
        except ConnectionError:
            # It says why below.
            pass
        check(*stream.end())
    for put_data, path, place, mtime_s in apart:
        put_data(path, place, carry, check)
        must(f"touch -d @{mtime_s} {place}")
    for script in tree.touches(directories):
        must(script)
    return True


def _put_whole(path: Path, place: str, carry: Carry, check: Callable[[int | None, str], None]) -> None:
    with path.open("rb") as file:
        _send(path, carry, f"exec dd of={place} bs={READ_SIZE}", iter(lambda: file.read(PIECE), b""), check)


def _put_with_holes(path: Path, place: str, carry: Carry, check: Callable[[int | None, str], None]) -> None:
    with path.open("rb") as file:
        fd = file.fileno()
        size = os.fstat(fd).st_size
        runs = [(start // BLOCK, -(-end // BLOCK)) for start, end in data_extents(fd, size)]
        for index in range(0, max(1, len(runs)), RUNS_AT_ONCE):
            some = runs[index : index + RUNS_AT_ONCE]
            script = "".join(
                f"dd of={place} bs={BLOCK} seek={first} count={last - first} conv=notrunc iflag=fullblock 2>/dev/null || exit\n"
                for first, last in some
            )
            # A block's worth of zeros may be behind the end.
            _send(path, carry, f"{script}truncate -s {size} {place}", _blocks(fd, some), check)


def _blocks(fd: int, runs: list[tuple[int, int]]) -> Iterator[bytes]:
    for first, last in runs:
        for block in range(first, last, PIECE // BLOCK):
            wanted = min(PIECE, (last - block) * BLOCK)
            yield os.pread(fd, wanted, block * BLOCK).ljust(wanted, b"\0")


def _send(path: Path, carry: Carry, script: str, pieces: Iterator[bytes], check: Callable[[int | None, str], None]) -> None:
    stream = carry(script)
    if stream is None:
        raise VmIOError(f"nothing carries {str(path)!r} into the guest any more")
    with stream:
        # It says below why it takes no more.
        with suppress(ConnectionError):
            for piece in pieces:
                stream.send(piece)
        check(*stream.end())


class _Writer:
    """What tarfile writes to."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._failed = False

    def write(self, data: bytes) -> int:
        """Send all of it; nothing once that has failed, since tarfile has something to write even then."""
        if not self._failed:
            self._failed = True
            self._stream.send(data)
            self._failed = False
        return len(data)


class _Padded:
    """A file that has as much as its header says, also where it becomes shorter meanwhile."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        """Return so many bytes, zeros where the file has no more."""
        return self._file.read(size).ljust(size, b"\0")


def hole_script(name: str, size: int) -> str:
    """Return what prints each MiB of a file that is not all zeros, after a line with its number; `name` is quoted."""
    return f"""n=0; while [ $n -lt {-(-size // PIECE)} ]; do
    if [ $(dd if={name} bs={PIECE} skip=$n count=1 2>/dev/null | tr -d '\\000' | head -c 1 | wc -c) != 0 ]; then
        echo $n; dd if={name} bs={PIECE} skip=$n count=1 2>/dev/null || exit
    fi
    n=$((n + 1))
done"""


def take_with_holes(stream: Stream, file: BinaryIO, size: int) -> None:
    """Write what `hole_script` prints of a file of that size. Raises VmIOError where that makes no sense."""
    reader = Reader(stream)
    while line := reader.line():
        number = int(line) if line.isdigit() else -1
        wanted = min(PIECE, size - number * PIECE)
        data = reader.read(wanted) if number >= 0 and wanted > 0 else b""
        if not data or len(data) < wanted:
            raise VmIOError(f"it changed meanwhile, or the guest's shell said {line[:50]!r}")
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            if any(block):
                os.pwrite(file.fileno(), block, number * PIECE + start)


def take_whole(stream: Stream, file: BinaryIO, size: int) -> None:
    """Write what comes, up to `size` bytes of it."""
    left = size
    while left and (data := stream.receive(min(left, PIECE))):
        file.write(data)
        left -= len(data)
    file.flush()


class Reader:
    """What comes of a stream, as tarfile reads it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._rest = b""

    def read(self, size: int) -> bytes:
        """Return so many bytes; fewer only at the end."""
        parts, left = [self._rest[:size]], size - len(self._rest[:size])
        self._rest = self._rest[size:]
        while left and (data := self._stream.receive(left)):
            parts.append(data)
            left -= len(data)
        return b"".join(parts)

    def line(self) -> bytes:
        """Return a line without its end; empty at the end, and for a longer one than a number needs."""
        while b"\n" not in self._rest and len(self._rest) < 20 and (data := self._stream.receive(20 - len(self._rest))):
            self._rest += data
        line, _end, self._rest = self._rest.partition(b"\n")
        return line

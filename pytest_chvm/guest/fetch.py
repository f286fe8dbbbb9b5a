"""Copying files out of a guest, which is not trusted."""

from __future__ import annotations

import errno
import io
import os
import re
import shlex
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pytest_chvm.errors import HostError, VmError, VmIOError
from pytest_chvm.guest import carried
from pytest_chvm.guest.carried import Carry
from pytest_chvm.guest.files import Run, require_gnu_tar
from pytest_chvm.guest.tree import AT_ONCE, BLOCK, PIECE

if not hasattr(tarfile, "data_filter"):
    # Python before 3.11.4 (Debian 12 has 3.11.2) has no extraction filters (PEP 706).
    from backports import tarfile  # type: ignore[import-not-found,import-untyped,no-redef,unused-ignore]

# Mode, size, blocks, time of the last change and name, of a path that has no "//" in it.
STAT = "//%f %s %b %Y %n"
ENTRY = re.compile(rb"([0-9a-f]{1,8}) (\d{1,18}) (\d{1,18}) (-?\d{1,12})(?:\.\d*)? (.+)\n", re.S)
# For files of /proc and the like, which do not say how large they are.
LARGEST_UNSIZED = 32 << 20
HOLE_AT_ONCE = 64
# Of files in one archive that goes by a faster way than the console.
MANY_AT_ONCE = 2000
XATTR_HEADER = "SCHILY.xattr."


@dataclass(frozen=True)
class Entry:
    """A file in the guest as its `stat` describes it: `path` is relative to the copied directory, "." for that itself."""

    path: str
    mode: int
    size: int
    blocks: int
    mtime_s: int


@dataclass
class Fetch:
    """One `get` into a private directory of the host; `left` says what could not be copied, and why."""

    run: Run
    source: str
    # The shell's words that lead to the directory that the entries are relative to.
    enter: str
    root: Path
    carry: Carry | None = None
    xattrs: bool = False
    is_tree: bool = True
    left: list[str] = field(default_factory=list)

    def take(self, entries: list[Entry]) -> None:
        """Take all that the guest listed: directories, then files, and links last, so that nothing is written through one."""
        kinds: dict[int, list[Entry]] = {}
        for entry in entries:
            kinds.setdefault(stat.S_IFMT(entry.mode), []).append(entry)
        directories = kinds.pop(stat.S_IFDIR, [])
        for entry in directories:
            self._place(entry).mkdir(mode=0o700)
        files, links = kinds.pop(stat.S_IFREG, []), kinds.pop(stat.S_IFLNK, [])
        # A file without blocks is empty, or its size means nothing (/proc).
        self._take_unsized([entry for entry in files if entry.size <= PIECE and not entry.blocks and not self.xattrs])
        if sum(entry.size for entry in files) <= PIECE:
            self.carry = None
        # With extended attributes all go by the archive, which has them.
        large = [entry for entry in files if entry.size > PIECE and not self.xattrs]
        for entry in large:
            if not self._carry_file(entry):
                self._take_pieces(entry)
        small = [entry for entry in files if self.xattrs or (entry.blocks and entry.size <= PIECE)]
        if not self._carry_archives([*small, *links]):
            self._take_archives([*small, *links])
        for others in kinds.values():
            self.left += [f"{entry.path} is neither a file, a directory nor a link" for entry in others]
        for entry in reversed(directories):
            self._finish(self._place(entry), entry)

    def _place(self, entry: Entry) -> Path:
        parts = PurePosixPath(entry.path).parts
        if ".." in parts or entry.path.startswith("/"):
            raise VmIOError(f"what the guest sent for {self.source!r} cannot be unpacked: it lists {entry.path!r}")
        return self.root.joinpath(*parts)

    def _finish(self, place: Path, entry: Entry) -> None:
        # As tarfile's data filter: nobody else may write, nothing is set-uid, and the owner can read.
        place.chmod(stat.S_IMODE(entry.mode) & 0o755 | (0o700 if stat.S_ISDIR(entry.mode) else 0o600))
        os.utime(place, (entry.mtime_s, entry.mtime_s))

    def _take_pieces(self, entry: Entry) -> None:
        place, name = self._place(entry), shlex.quote(f"./{entry.path}")
        sparse = entry.blocks * 512 < entry.size
        pieces = -(-entry.size // PIECE)
        # Zeros are looked for in the guest, which is faster than its console.
        skip = (
            f"while [ $n -lt $last ] && [ $(dd if={name} bs={PIECE} skip=$n count=1 2>/dev/null |"
            " tr -d '\\000' | head -c 1 | wc -c) = 0 ]; do n=$((n+1)); done; "
        )
        with place.open("xb") as file:
            number = 0
            while number < pieces:
                last = min(pieces, number + HOLE_AT_ONCE)
                done = self.run(
                    f"{self.enter} && n={number} last={last} && {skip if sparse else ''}echo $n >&2 && "
                    f"if [ $n -lt $last ]; then dd if={name} bs={PIECE} skip=$n count=1 2>/dev/null; fi",
                    None,
                )
                if done.returncode != 0 or not re.fullmatch(r"\d{1,18}\n", done.stderr) or not number <= int(done.stderr) <= last:
                    self.left.append(f"{entry.path}: {done.stderr.strip()[:200]}")
                    break
                number = int(done.stderr)
                data = done.stdout_bytes[: max(0, entry.size - number * PIECE)]
                for start in range(0, len(data), BLOCK):
                    block = data[start : start + BLOCK]
                    if not sparse or any(block):
                        os.pwrite(file.fileno(), block, number * PIECE + start)
                if number < last and not data:
                    # It has become shorter.
                    break
                number += number < last
            else:
                file.truncate(entry.size)
        self._finish(place, entry)

    def _take_unsized(self, entries: list[Entry]) -> None:
        for batch in _batches(entries):
            copies = "".join(
                f"head -c {LARGEST_UNSIZED + 1} {shlex.quote('./' + entry.path)} >$t/{number} || rm $t/{number}\n"
                for number, entry in enumerate(batch)
            )
            done = self.run(f"{self.enter} && t=$(mktemp -d) || exit\ntrap 'rm -rf $t' EXIT\n{copies}cd $t && tar -cf - .", None)
            found = {}
            with tarfile.open(fileobj=io.BytesIO(done.stdout_bytes)) as tar:
                for member in tar:
                    if member.isreg() and (content := tar.extractfile(member)):
                        found[member.name.removeprefix("./")] = content.read()
                    elif member.name.strip("./"):
                        raise tarfile.TarError(f"it has {member.name[:100]!r}, which was not asked for")
            for number, entry in enumerate(batch):
                data = found.get(str(number))
                if data is None:
                    self.left.append(f"{entry.path}: {done.stderr.strip()[:200]}")
                    continue
                if len(data) > LARGEST_UNSIZED:
                    self.left.append(
                        f"{entry.path} does not say its size, and has more than {LARGEST_UNSIZED} bytes: have the guest copy it "
                        "to a file, and get that"
                    )
                    continue
                place = self._place(entry)
                with place.open("xb") as file:
                    file.write(data)
                self._finish(place, entry)

    def _carry_file(self, entry: Entry) -> bool:
        """Take a file by a faster way than the console; returns False, with nothing done, where there is none."""
        sparse = entry.blocks * 512 < entry.size
        name = shlex.quote(f"./{entry.path}")
        script = carried.hole_script(name, entry.size) if sparse else f"exec cat {name}"
        stream = self.carry(f"{self.enter} && {{ {script}\n}}") if self.carry else None
        if stream is None:
            return False
        place = self._place(entry)
        with stream, place.open("xb") as file:
            (carried.take_with_holes if sparse else carried.take_whole)(stream, file, entry.size)
            status, stderr = stream.end()
            file.truncate(entry.size)
        if status != 0:
            self.left.append(f"{entry.path}: {stderr.strip()[:200]}")
        self._finish(place, entry)
        return True

    def _carry_archives(self, entries: list[Entry]) -> bool:
        if self.carry is None:
            return False
        for number, batch in enumerate(_batches(entries, MANY_AT_ONCE, MANY_AT_ONCE * PIECE)):
            stream = self.carry(self._archive(batch))
            if stream is None and number == 0:
                return False
            if stream is None:
                raise VmIOError(f"nothing carries {self.source!r} out of the guest any more")
            with stream:
                wanted = _wanted(batch)
                # The stubs ask for more than what is used of a stream's file.
                archive: Any = carried.Reader(stream)
                with tarfile.open(mode="r|", fileobj=archive, bufsize=PIECE) as tar:
                    self._unpack(tar, wanted)
                _status, stderr = stream.end()
                self.left += [f"{name}: {stderr.strip()[:200]}" for name in wanted]
        return True

    def _take_archives(self, entries: list[Entry]) -> None:
        for batch in _batches(entries):
            wanted = _wanted(batch)
            # tar's status also tells of files that changed meanwhile; missing ones are found below.
            done = self.run(self._archive(batch), None)
            with tarfile.open(fileobj=io.BytesIO(done.stdout_bytes)) as tar:
                self._unpack(tar, wanted)
            self.left += [f"{name}: {done.stderr.strip()[:200]}" for name in wanted]

    def _archive(self, batch: list[Entry]) -> str:
        names = " ".join(shlex.quote(f"./{entry.path}") for entry in batch)
        # Of a file that is itself the source, what a link leads to.
        follow = "" if self.is_tree else " -h"
        keep = f"{follow} -S --xattrs --xattrs-include='*' --no-recursion" if self.xattrs else ""
        return f"{self.enter} && tar{keep} -cf - {names}"

    def _unpack(self, tar: tarfile.TarFile, wanted: dict[str, Entry]) -> None:
        """Unpack an archive; what of `wanted` it has is removed there. Raises TarError for anything else that it has."""
        for member in tar:
            name = str(PurePosixPath(member.name))
            entry = wanted.pop(name, None)
            if entry is None or not (member.isreg() or member.islnk() or member.issym()):
                raise tarfile.TarError(f"it has {member.name[:100]!r}, which was not asked for")
            if member.size > entry.size + PIECE:
                raise tarfile.TarError(f"{member.name[:100]!r} has {member.size} bytes there, and had {entry.size}")
            try:
                tar.extract(member, self.root, filter="data")
            except (tarfile.AbsoluteLinkError, tarfile.LinkOutsideDestinationError):
                if not member.issym() or not stat.S_ISLNK(entry.mode):
                    raise
                self.left.append(f"{name} is a link that leads out of it, to {member.linkname[:200]!r}")
                continue
            if self.xattrs and member.isreg():
                self._take_xattrs(self._place(entry), name, member)

    def _take_xattrs(self, place: Path, name: str, member: tarfile.TarInfo) -> None:
        for header, value in member.pax_headers.items():
            attribute = header.removeprefix(XATTR_HEADER)
            # Others are the host's security, which is not the guest's to say.
            if header == attribute or not attribute.startswith("user."):
                continue
            try:
                os.setxattr(place, attribute, value.encode(errors="surrogateescape"))
            except OSError as error:
                self.left.append(f"{name}: its attribute {attribute[:100]!r}: {error.strerror}")


def _wanted(batch: list[Entry]) -> dict[str, Entry]:
    return {str(PurePosixPath(entry.path)): entry for entry in batch}


def _batches(entries: Iterable[Entry], most: int = AT_ONCE, most_bytes: int = PIECE) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        batch.append(entry)
        size += entry.size
        if len(batch) == most or size > most_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _listed(run: Run, source: str) -> tuple[bool, list[Entry]]:
    """Return whether the source is a directory, and the entries that the guest lists."""
    path = shlex.quote(source)
    done = run(
        f"if [ -d {path} ]; then cd {path} && echo d && find . -print0 | xargs -0 stat -c '{STAT}'\n"
        f"else echo f; stat -L -c '{STAT}' {path}; fi",
        None,
    )
    kind, *records = done.stdout_bytes.split(b"//") if done.stdout_bytes.startswith(b"d") else done.stdout_bytes.split(b"//", 1)
    if not records:
        raise VmIOError(f"{source!r} could not be got from the guest: {done.stderr.strip()[:500]}")
    entries = []
    for record in records:
        found = ENTRY.fullmatch(record)
        if found is None:
            raise VmIOError(f"what the guest sent for {source!r} cannot be unpacked: its stat said {record[:100]!r}")
        entries.append(Entry(os.fsdecode(found[5]), int(found[1], 16), int(found[2]), int(found[3]), max(0, int(found[4]))))
    return kind == b"d\n", entries


def get(run: Run, source: str, destination: Path, *, carry: Carry | None = None, xattrs: bool = False) -> Path:
    """Copy a file or a directory tree of the guest's to `destination`, or into it where it is a directory.

    Returns the path it has then. A link that is itself the source is followed; modes, times and holes are kept, and the links in a
    tree that stay in it; with `xattrs` the extended attributes of files whose names begin with "user." `carry` is a faster
    way for more than a MiB. What the guest sends is not trusted: nothing is written outside the destination, and of special files,
    owners and set-uid bits nothing is taken over. Raises UnsupportedError where the guest's tar keeps no extended attributes,
    VmIOError where it is not there or cannot be read, HostError where the
    host's disk is full; VmIOError also after the rest of a tree was got, naming what could not be: links that lead out of it,
    special files, what the guest cannot read, what does not say its size and has more than 32 MiB.
    """
    if xattrs:
        require_gnu_tar(run)
    path = PurePosixPath(source)
    target = destination / path.name if destination.is_dir() else destination
    is_tree, entries = _listed(run, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    unpacked = Path(tempfile.mkdtemp(prefix=".chvm.", dir=target.parent))
    try:
        if is_tree:
            fetch = Fetch(run, source, f"cd {shlex.quote(source)}", unpacked / "got", carry, xattrs)
        else:
            fetch = Fetch(run, source, f"cd {shlex.quote(str(path.parent))}", unpacked, carry, xattrs, is_tree=False)
            # A link is followed by the copy of its target, which is read like one that has no size.
            entries = [Entry(path.name, *_facts(entries[0]))]
        fetch.take(entries)
        if not is_tree and fetch.left:
            raise VmIOError(f"{source!r} could not be got from the guest: {'; '.join(fetch.left)}")
        (unpacked / ("got" if is_tree else path.name)).replace(target)
    except (tarfile.TarError, OSError) as error:
        if isinstance(error, VmError):
            # Some of them are OSErrors.
            raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise HostError(f"{source!r} cannot be written to {str(target)!r} on the host: {error.strerror}") from error
        raise VmIOError(f"what the guest sent for {source!r} cannot be unpacked to {str(target)!r}: {error}") from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    if fetch.left:
        raise VmIOError(f"{source!r} was got to {str(target)!r}, but not all of it: {'; '.join(fetch.left)[:2000]}")
    return target


def _facts(entry: Entry) -> tuple[int, int, int, int]:
    # With no blocks it is read by its contents: an archive would have the link.
    blocks = 0 if entry.size <= PIECE else entry.blocks
    return entry.mode, entry.size, blocks, entry.mtime_s

"""A program that waits in the guest before anybody asks for it, in each clone too; with its files it is a part of the initramfs."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

from pytest_chvm.base.cache import built_once
from pytest_chvm.base.progress import Progress
from pytest_chvm.guest.initramfs import Entry, write_cpio
from pytest_chvm.model import Resident

ROOT = "host/resident"
# Run by init. Descriptor 3: a FIFO that says what the program is asked for; 4: the first root; 5: where it says that it waits, for
# which init waits. Who waits for an answer when it has ended is told so.
SCRIPT = """\
mkdir -p -m 700 /run/chvm/resident
mkfifo -m 600 /run/chvm/resident/ask /run/chvm/resident/answer
{{
    {{
        exec 3<>/run/chvm/resident/ask 4</ 5>&1 >>/run/chvm/resident/out 2>&1 </dev/null
        env -i {environment} chroot /{root} {command}
        status=$?
        exec 4<&- 5>&-
        while :; do
            echo "{{\\"ended\\": $status}}" >/run/chvm/resident/answer
            read -r asked <&3
        done
    }} &
}} | {{
    read -r ready || echo "chvm: the resident program has ended: $(cat /run/chvm/resident/out)"
}} >/dev/console
"""


def add_resident(initramfs: Path, resident: Resident, cache: Path, progress: Progress) -> Path:
    """Return an initramfs with a resident program, built where there is none with files of the same times and sizes."""
    made_of = [os.fspath(initramfs), resident.command, resident.environment, SCRIPT, [_identity(path) for path in resident.files]]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]

    def build(directory: Path) -> None:
        progress("building a guest with a resident program")
        own = initramfs.read_bytes()
        (directory / "initramfs.cpio").write_bytes(own + bytes(-len(own) % 512) + write_cpio(_entries(resident)))

    return built_once(cache / "initramfs" / key, build, progress=progress) / "initramfs.cpio"


def _identity(path: Path) -> tuple[str, int, int]:
    found = path.stat()
    # A compiled file says by itself what it is compiled from, and is written anew for nothing.
    return os.fspath(path), 0 if path.suffix == ".pyc" else found.st_mtime_ns, found.st_size


def _entries(resident: Resident) -> Iterator[Entry]:
    environment = shlex.join(f"{name}={value}" for name, value in resident.environment)
    script = SCRIPT.format(root=ROOT, environment=environment, command=shlex.join(resident.command))
    yield Entry("lib/chvm/resident", stat.S_IFREG | 0o644, script.encode())
    made = {"host"}
    yield Entry("host", stat.S_IFDIR | 0o755)
    for directory in ("", "/tmp", "/dev", "/proc"):
        made.add(ROOT + directory)
        yield Entry(ROOT + directory, stat.S_IFDIR | 0o755)
    yield Entry(f"{ROOT}/dev/null", stat.S_IFCHR | 0o666, device=(1, 3))
    yield Entry(f"{ROOT}/dev/urandom", stat.S_IFCHR | 0o666, device=(1, 9))
    for path in resident.files:
        yield from _with_its_way(path, made)


def _with_its_way(path: Path, made: set[str]) -> Iterator[Entry]:
    """Yield a file with the directories and links that lead to it, but for those in `made`."""
    way, left = Path("/"), list(path.parts[1:])
    while left:
        way = Path(os.path.normpath(way / left.pop(0)))
        name = f"{ROOT}{way}"
        if way.is_symlink():
            target = os.readlink(way)  # noqa: PTH115
            if name not in made:
                made.add(name)
                yield Entry(name, stat.S_IFLNK | 0o777, os.fsencode(target))
            to = Path(os.path.normpath(way.parent / target))
            way, left = Path("/"), [*to.parts[1:], *left]
        elif name not in made:
            made.add(name)
            if way.is_dir():
                yield Entry(name, stat.S_IFDIR | 0o755)
            else:
                found = way.stat()
                mode = stat.S_IFREG | (0o755 if found.st_mode & 0o100 else 0o644)
                yield Entry(name, mode, way.read_bytes(), mtime=int(found.st_mtime))

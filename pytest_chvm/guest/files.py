"""Files into a guest over its shell, in pieces of a MiB: neither side holds more of them in its memory.

Small files go as tar archives; large files, files with holes and files whose stated size is wrong (/proc) go one by one.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pytest_chvm.errors import InvalidConfigError, UnsupportedError, VmError, VmIOError
from pytest_chvm.guest.carried import Carry, put_carried
from pytest_chvm.guest.tree import Tree
from pytest_chvm.model import CommandResult

Run = Callable[[str, bytes | None], CommandResult]


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

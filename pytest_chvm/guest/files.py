"""Files into and out of a guest, as tar archives over its shell."""

from __future__ import annotations

import io
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from pytest_chvm.errors import InvalidConfigError, VmIOError
from pytest_chvm.model import CommandResult

if not hasattr(tarfile, "data_filter"):
    # Python before 3.11.4 (Debian 12 has 3.11.2) has no extraction filters (PEP 706).
    from backports import tarfile  # type: ignore[import-not-found,import-untyped,no-redef,unused-ignore]

Run = Callable[[str, bytes | None], CommandResult]


def put(run: Run, source: Path, destination: str) -> None:
    """Copy a file or a directory tree of the host's to `destination` in the guest, with its modes.

    A destination that ends with "/" or is a directory takes it under its own name. Raises InvalidConfigError where there
    is no source, VmIOError where the guest cannot take it.
    """
    if not source.exists():
        raise InvalidConfigError(f"{str(source)!r} does not exist: there is nothing to put into the guest")
    quoted = shlex.quote(destination)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(source, arcname="chvm-put", filter=_as_root)
    # Unpacked beside its place and moved there, so that the name in the archive need not be the one it gets.
    script = (
        f'set -e; dst={quoted}; case $dst in */) mkdir -p "$dst";; esac\n'
        f'[ -d "$dst" ] && dst=$dst/{shlex.quote(source.name)}\n'
        'dir=$(dirname "$dst"); mkdir -p "$dir"; tmp=$(mktemp -d "$dir/.chvm.XXXXXX"); trap \'rm -rf "$tmp"\' EXIT\n'
        'tar -xf - -C "$tmp"; [ ! -d "$dst" ] || { echo "$dst: is a directory" >&2; exit 1; }; mv -f "$tmp/chvm-put" "$dst"'
    )
    done = run(script, archive.getvalue())
    if done.returncode != 0:
        raise VmIOError(f"{str(source)!r} could not be put to {destination!r} in the guest: {done.stderr.strip()[:500]}")


def _as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def get(run: Run, source: str, destination: Path) -> Path:
    """Copy a file or a directory tree of the guest's to `destination`, or into it where it is a directory.

    Returns the path it has then. What the guest sends is not trusted: nothing is written outside the destination, and of special
    files, owners and set-uid bits nothing is taken over. Raises VmIOError where it is not there or cannot be read.
    """
    path = PurePosixPath(source)
    parent, name = shlex.quote(str(path.parent)), shlex.quote(f"./{path.name}")
    done = run(f"cd {parent} && tar -cf - {name}", None)
    if done.returncode != 0:
        raise VmIOError(f"{source!r} could not be got from the guest: {done.stderr.strip()[:500]}")
    target = destination / path.name if destination.is_dir() else destination
    import shutil
    import tempfile

    target.parent.mkdir(parents=True, exist_ok=True)
    unpacked = Path(tempfile.mkdtemp(prefix=".chvm.", dir=target.parent))
    try:
        with tarfile.open(fileobj=io.BytesIO(done.stdout_bytes)) as tar:
            tar.extractall(unpacked, filter="data")
        (unpacked / path.name).replace(target)
    except (tarfile.TarError, OSError) as error:
        raise VmIOError(f"what the guest sent for {source!r} cannot be unpacked to {str(target)!r}: {error}") from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return target

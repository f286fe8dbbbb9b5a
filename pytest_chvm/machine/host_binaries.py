"""Programs of the host's in a guest."""

from __future__ import annotations

import platform
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from pytest_chvm.base.untouched import random_hex
from pytest_chvm.errors import UnsupportedError
from pytest_chvm.guest.host_binary import HostBinary
from pytest_chvm.machine.machine import Machine


def bring(machine: Machine, binary: HostBinary, put: Callable[[Path, str], None]) -> None:
    """Have a program and its libraries be in a guest, those that are not there yet; raises UnsupportedError for an image.

    `put` copies a directory of the host's to a path of the guest's.
    """
    if not machine.config.architecture.is_host:
        raise UnsupportedError(
            f"VM {machine.name!r} is {machine.config.arch}, and {str(binary.file)!r} is for this machine, {platform.machine()}: "
            "put a program of that architecture into it",
            vm_name=machine.name,
        )
    if not machine.guest.takes_host_libraries:
        raise UnsupportedError(
            f"VM {machine.name!r} is an image with libraries of its own, in whose place the host's could come: put a program that "
            "is linked statically into it and run that, or use a VM with root='host'",
            vm_name=machine.name,
        )
    if not (missing := _missing(machine, binary)):
        return
    place = f"/.chvm-{random_hex(8)}"
    with tempfile.TemporaryDirectory(prefix="chvm-") as directory:
        for path in missing:
            target = Path(f"{directory}{path}")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(binary.files[path], target)
        put(Path(directory), place)
    # File by file: the guest's directories stay as they are.
    moved = machine.run(
        f"set -e; cd {place}\n"
        'find . -type f | while IFS= read -r file; do mkdir -p "/${file%/*}"; mv -f "$file" "/$file"; done\n'
        f"cd /; rm -rf {place}",
        input=None,
    )
    machine.check_succeeded(moved)


def _missing(machine: Machine, binary: HostBinary) -> list[str]:
    """Return which of a program's files the guest does not have as they are here, by size and time."""
    files = binary.files
    asked = "".join(f"stat -L -c '%s %Y' {shlex.quote(path)} 2>/dev/null || echo\n" for path in files)
    answers = machine.run(asked, input=None).stdout.splitlines()
    here = ((found.st_size, int(found.st_mtime)) for found in (file.stat() for file in files.values()))
    there = [*answers, *[""] * len(files)]
    return [path for path, (size, mtime_s), answer in zip(files, here, there, strict=False) if answer != f"{size} {mtime_s}"]

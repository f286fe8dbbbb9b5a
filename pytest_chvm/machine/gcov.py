"""Which lines of its kernel a guest has run: what a kernel with CONFIG_GCOV_KERNEL has counted, for gcov(1) and lcov(1)."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from pytest_chvm.base.untouched import random_hex
from pytest_chvm.errors import UnsupportedError
from pytest_chvm.machine.machine import Machine

COLLECT_TIMEOUT_S = 600.0
# A file there is what has been counted at the moment when it is opened, and does not say how large it is (gcov.rst of the kernel).
COLLECT = """\
[ -d /sys/kernel/debug/gcov ] || mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
cd /sys/kernel/debug/gcov 2>/dev/null || exit 0
find . -name '*.gcda' | while IFS= read -r file; do
    mkdir -p {place}/"${{file%/*}}"
    cat <"$file" >{place}/"$file" || exit 1
done
"""


def collect(machine: Machine, directory: Path, get: Callable[[str, Path], object]) -> None:
    """Bring what a guest's kernel has counted into a directory, below it by the paths of the tree that it was built in.

    Beside each file is a link to the notes that the compiler made for it, where that tree is on this host. `get` copies a directory
    of the guest's. Raises UnsupportedError where its kernel counts nothing.
    """
    place = f"/tmp/chvm-{random_hex(8)}"
    try:
        done = machine.run(COLLECT.format(place=shlex.quote(place)), input=None, timeout=COLLECT_TIMEOUT_S)
        machine.check_succeeded(done)
        if machine.run(f"[ -d {place} ]", input=None).returncode != 0:
            raise UnsupportedError(
                f"VM {machine.name!r}: its kernel counts nothing: it needs CONFIG_GCOV_KERNEL, and what is to be counted "
                "CONFIG_GCOV_PROFILE_ALL or GCOV_PROFILE in its Makefile",
                vm_name=machine.name,
            )
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".chvm-", dir=directory) as unfinished:
            get(place, Path(unfinished, "gcov"))
            counted = Path(unfinished, "gcov")
            shutil.copytree(counted, directory, symlinks=True, dirs_exist_ok=True)
            _link_notes(directory, [file.relative_to(counted).with_suffix(".gcno") for file in counted.rglob("*.gcda")])
    finally:
        if not machine.ended:
            machine.run(f"rm -rf {place}", input=None)


def _link_notes(directory: Path, notes: list[Path]) -> None:
    for name in notes:
        # Nothing but a file: a guest that says where a directory is could have the next one written there.
        if (there := Path("/", name)).is_file():
            (directory / name).unlink(missing_ok=True)
            (directory / name).symlink_to(there)

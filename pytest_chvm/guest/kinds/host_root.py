"""The host's own file system, in the built-in guest: what runs commands stays outside it, each command is run in it."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import ClassVar

from pytest_chvm.base.progress import Progress
from pytest_chvm.base.untouched import random_hex
from pytest_chvm.guest import enter
from pytest_chvm.guest.commands import script_of
from pytest_chvm.guest.initramfs import Entry, find_busybox
from pytest_chvm.guest.kernels.kernel import Kernel
from pytest_chvm.guest.kernels.module_tree import module_tree
from pytest_chvm.guest.kinds.built_in import BuiltInGuest
from pytest_chvm.model import HOST_ROOT_TAG, SharedDir

# Of the test's environment, what its commands have in the guest too: no more than what finds the same programs.
PASSED_ENVIRONMENT = ("PATH", "HOME")
# Linux takes no argument of 128 KiB (MAX_ARG_STRLEN, execve(2)).
LONGEST_ARGUMENT = 100_000


@dataclass(frozen=True, slots=True)
class HostRootGuest(BuiltInGuest):
    """The built-in guest, whose first shared dir becomes the root of its commands."""

    has_host_files: ClassVar[bool] = True
    more_modules: ClassVar[tuple[str, ...]] = ("overlay",)

    @staticmethod
    def more_files(kernel: Kernel, cache: Path, progress: Progress) -> Sequence[Entry]:
        """Return what its root is mounted by, the program that runs a command there, and where the kernel's modules are."""
        mounts = resources.files("pytest_chvm.guest").joinpath("root.fstab").read_bytes()
        return [
            Entry("lib/chvm/root.fstab", stat.S_IFREG | 0o644, mounts),
            Entry("lib/chvm/enter", stat.S_IFREG | 0o755, enter.program(kernel.architecture)),
            Entry("lib/chvm/root.modules", stat.S_IFREG | 0o644, _modules_link(kernel, cache, progress)),
        ]

    def share_word(self, share: SharedDir) -> str:
        """Return another word for the one that is the root."""
        if share.tag != HOST_ROOT_TAG:
            return BuiltInGuest.share_word(self, share)
        # Served by an ordinary user, what is root's on the host is nobody's in the guest, and mount(8) would run as nobody.
        is_roots = os.geteuid() == 0 and Path("/").stat().st_uid == 0
        return f"chvm.root={share.tag}" if is_roots else f"chvm.root={share.tag},nosuid"

    def in_its_place(self, command: str | Sequence[str]) -> str:
        """Return what runs it in the root, and there in the test's directory where the guest has that."""
        script_of(command)
        try:
            place = os.getcwd()
        except FileNotFoundError:
            place = "/"
        passed = "".join(f"export {name}={shlex.quote(os.environ[name])};" for name in PASSED_ENVIRONMENT if name in os.environ)
        words, behind = _words(command)
        return f"{passed}exec /lib/chvm/enter {shlex.quote(place)} {shlex.join(map(os.fsdecode, words))}{behind}"


def _modules_link(kernel: Kernel, cache: Path, progress: Progress) -> bytes:
    """Return where a link to the kernel's modules is to be, for modprobe, and what it leads to; empty for none."""
    tree = kernel.modules_dir
    if tree is None or kernel.release is None:
        return b""
    places = Path("/lib/modules").resolve()
    if places / tree.name == tree.resolve():
        return b""
    linked = module_tree(kernel, find_busybox(cache, progress), cache, progress)
    return os.fsencode(f"{places}\n{linked.resolve()}\n")


def _words(command: str | Sequence[str]) -> tuple[Sequence[str], str]:
    """Return the program with its arguments that runs a command, and what has to be behind them in a script."""
    if not isinstance(command, str):
        # What is not found by a path its shell has to look for.
        return command if "/" in os.fsdecode(command[0]) else ["/bin/sh", "-c", 'exec "$0" "$@"', *command], ""
    if len(os.fsencode(command)) <= LONGEST_ARGUMENT:
        return ["/bin/sh", "-c", command], ""
    end = random_hex(16)
    return ["/bin/sh", "-c", ". /dev/fd/3"], f" 3<<'{end}'\n{command}\n{end}\n"

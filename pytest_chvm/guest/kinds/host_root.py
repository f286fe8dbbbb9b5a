"""The host's own file system, in the built-in guest: what runs commands stays outside it, each command is run in it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_chvm.guest.kinds.built_in import BuiltInGuest
from pytest_chvm.model import HOST_ROOT_TAG, SharedDir

# Of the test's environment, what its commands have in the guest too: no more than what finds the same programs.
PASSED_ENVIRONMENT = ("PATH", "HOME")
# What the built-in guest's initramfs has beside its own for this.
MODULES = ("overlay",)
FILES = ("root.fstab",)


@dataclass(frozen=True, slots=True)
class HostRootGuest(BuiltInGuest):
    """The built-in guest, whose first shared dir becomes the root of its commands."""

    def share_word(self, share: SharedDir) -> str:
        """Return another word for the one that is the root."""
        return f"chvm.root={share.tag}" if share.tag == HOST_ROOT_TAG else BuiltInGuest.share_word(self, share)

    def in_its_place(self, command: str | Sequence[str]) -> str | Sequence[str]:
        """Return it in the test's directory, where the guest has that."""
        try:
            place = os.getcwd()
        except FileNotFoundError:
            place = "/"
        passed = "".join(f"export {name}={shlex.quote(os.environ[name])};" for name in PASSED_ENVIRONMENT if name in os.environ)
        set_up = f"cd {shlex.quote(place)} 2>/dev/null;{passed}"
        return f"{set_up}{command}" if isinstance(command, str) else ["sh", "-c", f'{set_up}exec "$@"', "sh", *command]

"""The host's own file system, in the built-in guest: what runs commands stays outside it, each command is run in it."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_chvm.guest.kinds.built_in import BuiltInGuest
from pytest_chvm.model import HOST_ROOT_TAG, SharedDir

# What the built-in guest's initramfs has beside its own for this.
MODULES = ("overlay",)
FILES = ("root.fstab",)


@dataclass(frozen=True, slots=True)
class HostRootGuest(BuiltInGuest):
    """The built-in guest, whose first shared dir becomes the root of its commands."""

    def share_word(self, share: SharedDir) -> str:
        """Return another word for the one that is the root."""
        return f"chvm.root={share.tag}" if share.tag == HOST_ROOT_TAG else BuiltInGuest.share_word(self, share)

"""An image of the user's own: their initramfs or root disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pytest_chvm.guest import renewal
from pytest_chvm.guest.kinds import Guest, Run


@dataclass(frozen=True, slots=True)
class ImageGuest(Guest):
    """A guest that knows nothing of us but the line that says that it is ready."""

    built_in: ClassVar[bool] = False

    def own_words(self) -> list[str]:
        """Return none: an image has a host name of its own."""
        return []

    def boot_words(self, _marker: str, networks: list[str]) -> list[str]:
        """Return the words of its networks, where the user gave it a kernel command line."""
        return networks if self.config.cmdline is not None else []

    def set_up_for_saving(self, run: Run, ip: Callable[[], str], told: Sequence[str], *, trial: bool) -> str:
        """Put the program that renews it into it, tried at once where `trial`: a test's own VM goes on with its clock."""
        return renewal.put_into(run, ip(), told, trial=trial)

    def nonce_after_reboot(self, _nonce: str | None) -> str | None:
        """Return none: a clone was told of one when it was renewed, and has forgotten it."""
        return None

    def sets_clock(self, *, shell_was_used: bool) -> bool:
        """Return whether it is known to have a shell."""
        return shell_was_used

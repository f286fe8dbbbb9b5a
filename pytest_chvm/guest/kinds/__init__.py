"""The kinds of guest, one file each: what each is told, how it is made ready to be saved, and what it does when it starts again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pytest_chvm.guest.ready import DEFAULT_MARKER
from pytest_chvm.model import CommandResult, VmConfig

# Runs a command in the guest, with an input.
Run = Callable[[str, bytes | None], CommandResult]


@dataclass(frozen=True, slots=True)
class Guest(ABC):
    """What is booted: a complete config, and the nonce that its ready line must have, if any.

    `lacks` says in words why it may lack drivers.
    """

    built_in: ClassVar[bool]
    # What runs its commands, a kind of `pytest_chvm.guest.channels`.
    channel: ClassVar[str] = "console"

    config: VmConfig
    nonce: str | None = None
    lacks: str | None = None

    def words(self, marker: str) -> list[str]:
        """Return what the guest is told beside its networks, on its kernel command line or as a clone."""
        words = [f"chvm.nonce={self.nonce}"] if self.nonce is not None else []
        words += self.own_words()
        if marker != DEFAULT_MARKER:
            words.append(f"chvm.marker={marker}")
        words += [disk.kind.guest_word for disk in self.config.all_disks if disk.kind.guest_word is not None]
        return words + [f"chvm.share={share.guest_word}" for share in self.config.shared_dirs]

    @abstractmethod
    def own_words(self) -> list[str]:
        """Return what only this kind of guest is told."""

    @abstractmethod
    def boot_words(self, marker: str, networks: list[str]) -> list[str]:
        """Return what is added to the kernel command line of a boot; `networks` are the words of its NICs."""

    @abstractmethod
    def set_up_for_saving(self, run: Run, ip: Callable[[], str], told: Sequence[str], *, trial: bool) -> str:
        """Return the shell line that the guest's console shell runs before the guest is saved, for its clones to be renewed.

        `ip` returns the address that the guest says it has, `told` the words of its kernel command line. `trial`: only clones
        come of the guest. Raises UnsupportedError where its clones could not be renewed.
        """

    @abstractmethod
    def nonce_after_reboot(self, nonce: str | None) -> str | None:
        """Return what the ready line must have after a reboot of a guest whose ready line had `nonce`."""

    @abstractmethod
    def sets_clock(self, *, shell_was_used: bool) -> bool:
        """Tell whether its clock is set after a pause."""

"""An image of the user's own: their initramfs or root disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from pytest_chvm.errors import UnsupportedError
from pytest_chvm.guest import renewal
from pytest_chvm.guest.kinds import Guest, Run
from pytest_chvm.model import SharedDir, Tap, VmConfig


@dataclass(frozen=True, slots=True)
class ImageGuest(Guest):
    """A guest that knows nothing of us but the line that says that it is ready."""

    cloned_at_once: ClassVar[bool] = False
    takes_host_keys: ClassVar[bool] = True
    reads_words_of_file: ClassVar[bool] = False

    def own_words(self) -> list[str]:
        """Return none: an image has a host name of its own."""
        return []

    def boot_words(self, _marker: str, networks: list[str]) -> list[str]:
        """Return the words of its networks, where the user gave it a kernel command line."""
        return networks if self.config.cmdline is not None else []

    def clone_key(self, marker: str) -> list[str]:
        """Return the marker too: its clones have to say the word that the image says."""
        return ["image", marker]

    def why_no_clone(self, network_mode: str) -> str | None:
        """Return what the built-in guest could set up in a clone too, and an image has set up in its boot."""
        why, config = None, self.config
        has_network = bool(config.networks) if config.networks is not None else network_mode != "none"
        if config.shared_dirs or any(disk.written for disk in config.all_disks):
            why = "what it does with a data_disk or shared dirs it does when it boots"
        elif config.netns is not None:
            why = "it is in a network namespace, which its template would not be in"
        elif has_network and config.cmdline is None:
            why = "it is not told its addresses: give it a cmdline"
        elif not all(isinstance(network, Tap) and network.name is None for network in config.networks or ()) or (
            config.networks is None and network_mode == "user"
        ):
            why = "it is on a network whose addresses are not given by a TAP of ours"
        return why and f"it has an initramfs or root disk of its own, and {why}"

    def with_new_nonce(self, config: VmConfig) -> ImageGuest:
        """Return it without a nonce, which it would not print."""
        return replace(self, config=config, nonce=None)

    def mount_line(self, share: SharedDir) -> str:
        """Raise UnsupportedError: nobody knows what it does with a shared dir."""
        raise UnsupportedError(f"the shared dir {share.tag!r} of an image of its own cannot be plugged in again")

    def set_up_for_saving(self, run: Run, ip: Callable[[], str], told: Sequence[str], *, trial: bool) -> str:
        """Put the program that renews it into it, tried at once where `trial`: a test's own VM goes on with its clock."""
        return renewal.put_into(run, ip(), told, self.config.architecture, trial=trial)

    def nonce_after_reboot(self, _nonce: str | None) -> str | None:
        """Return none: a clone was told of one when it was renewed, and has forgotten it."""
        return None

    def sets_clock(self, *, shell_was_used: bool) -> bool:
        """Return whether it is known to have a shell."""
        return shell_was_used

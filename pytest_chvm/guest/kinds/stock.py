"""A stock image: its own system, unchanged, with what the host needs of it put in front."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from pytest_chvm.base.untouched import random_hex
from pytest_chvm.errors import UnsupportedError
from pytest_chvm.guest import renewal
from pytest_chvm.guest.kinds import Guest, Run
from pytest_chvm.model import SharedDir, Tap, VmConfig

HOSTNAME_WORD = "chvm.hostname="
BOOT_STATE = """\
[ -d /run/systemd/system ] && systemctl list-jobs --no-legend --no-pager | head -n 20
[ -e /run/cloud-init/status.json ] && cloud-init status --long
"""


@dataclass(frozen=True, slots=True)
class StockGuest(Guest):
    """An image's own system behind our initramfs, which leaves in its `/run` what the host needs."""

    cloned_at_once: ClassVar[bool] = False
    takes_host_keys: ClassVar[bool] = True
    reads_words_of_file: ClassVar[bool] = True
    warns_on_console: ClassVar[bool] = True
    # A whole system, which software may have to run; its services still start when it is ready.
    boot_timeout_s: ClassVar[float] = 300.0
    connect_timeout_s: ClassVar[float] = 120.0
    boot_state: ClassVar[str | None] = BOOT_STATE

    def own_words(self) -> list[str]:
        """Return its host name, which a seed may change, and that its network is no affair of the image's, unless it was told."""
        name = self.config.name.replace("_", "-").replace(".", "-")
        own_network = self.config.network_config is not None
        return [HOSTNAME_WORD + name, f"systemd.hostname={name}", *([] if own_network else ["network-config=disabled"])]

    def boot_words(self, marker: str, networks: list[str]) -> list[str]:
        """Return all its words."""
        return self.words(marker) + networks

    def clone_key(self, _marker: str) -> list[str]:
        """Return its name: each clone is told what it says when it is ready."""
        return ["stock"]

    def why_no_clone(self, network_mode: str) -> str | None:
        """Return what an image has set up in its boot."""
        config = self.config
        if config.shared_dirs or any(disk.written for disk in config.all_disks):
            return "what its image does with a data_disk or shared dirs it does when it boots"
        if config.netns is not None:
            return "it is in a network namespace, which its template would not be in"
        if not all(isinstance(network, Tap) and network.name is None for network in config.networks or ()):
            return "it is on a network whose addresses are not given by a TAP of ours"
        return None

    def with_new_nonce(self, config: VmConfig) -> StockGuest:
        """Return it with a nonce that nothing has printed yet."""
        return replace(self, config=config, nonce=random_hex(8))

    def mount_line(self, share: SharedDir) -> str:
        """Raise UnsupportedError: one with shared dirs is not saved."""
        raise UnsupportedError(f"the shared dir {share.tag!r} of an image cannot be plugged in again")

    def set_up_for_saving(self, run: Run, ip: Callable[[], str], told: Sequence[str], *, trial: bool) -> str:
        """Put the program that renews it into it; where it still has the host name that it was told, a clone is told its own."""
        name = next((word.removeprefix(HOSTNAME_WORD) for word in told if word.startswith(HOSTNAME_WORD)), "")
        return f"{renewal.put_into(run, ip(), told, self.config.architecture, trial=trial)}; chvm_told_name={shlex.quote(name)}"

    def nonce_after_reboot(self, nonce: str | None) -> str | None:
        """Return the same: it is on its kernel command line."""
        return nonce

    def sets_clock(self, *, shell_was_used: bool) -> bool:
        """Return whether its shell is known to answer."""
        return shell_was_used

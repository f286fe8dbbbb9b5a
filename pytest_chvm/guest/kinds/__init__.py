"""The kinds of guest, one file each: what each is told, how it is made ready to be saved, and what it does when it starts again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pytest_chvm.guest.kernels.kernel import Kernel
from pytest_chvm.guest.ready import DEFAULT_MARKER
from pytest_chvm.model import CommandResult, SharedDir, VmConfig, names_in_guest

# Runs a command in the guest, with an input.
Run = Callable[[str, bytes | None], CommandResult]


@dataclass(frozen=True, slots=True)
class Guest(ABC):
    """What is booted: a complete config, and the nonce that its ready line must have, if any.

    `lacks` says in words why it may lack drivers. `kernel` is the config's as it was before it was unpacked (None: as it is there).
    `modules_disk` is a disk with all modules of its kernel, and `load_words` say which of them a
    boot loads before it is ready. `plugs_disks`: a clone of it has disks plugged in.
    """

    # Whether its first VM is a clone too: its template is known to boot. Of another guest the first VM shows whether it does.
    cloned_at_once: ClassVar[bool]
    # Whether its initramfs is ours: what a kernel command line has no room for can be a file of it.
    reads_words_of_file: ClassVar[bool]
    # How long it may take to be ready where nobody says.
    boot_timeout_s: ClassVar[float] = 60.0
    # How long its shell may take to answer the first line, once it is ready.
    connect_timeout_s: ClassVar[float] = 10.0
    # A shell script that says what a boot is still waiting for, where there is more to say than the console does.
    boot_state: ClassVar[str | None] = None
    # Whether the host's programs run in it as they are, and whether their libraries may be put where the host has them.
    has_host_files: ClassVar[bool] = False
    takes_host_libraries: ClassVar[bool] = False
    # What runs its commands, a kind of `pytest_chvm.guest.channels`.
    channel: ClassVar[str] = "console"
    # Whether nothing in it has asked its kernel for the boot id when it is ready: the kernel then makes one in each clone.
    keeps_boot_id_unread: ClassVar[bool] = False
    # Whether its clones are handed new SSH host keys, where it has some.
    takes_host_keys: ClassVar[bool] = False
    # Whether all that its kernel warns of is on its serial console.
    warns_on_console: ClassVar[bool] = False

    config: VmConfig
    nonce: str | None = None
    lacks: str | None = None
    kernel: Kernel | None = field(default=None, kw_only=True)
    modules_disk: Path | None = field(default=None, kw_only=True)
    load_words: tuple[str, ...] = field(default=(), kw_only=True)
    plugs_disks: bool = field(default=False, kw_only=True)

    def words(self, marker: str) -> list[str]:
        """Return what the guest is told beside its networks, on its kernel command line or as a clone."""
        words = [f"chvm.nonce={self.nonce}"] if self.nonce is not None else []
        words += self.own_words()
        if marker != DEFAULT_MARKER:
            words.append(f"chvm.marker={marker}")
        disks = self.config.all_disks
        words += [f"chvm.disk=/dev/{name}" for disk, name in zip(disks, names_in_guest(disks), strict=True) if disk.kind.awaited]
        return words + [self.share_word(share) for share in self.config.shared_dirs]

    def share_word(self, share: SharedDir) -> str:
        """Return what it is told of a shared dir."""
        return f"chvm.share={share.guest_word}"

    def in_its_place(self, command: str | Sequence[str]) -> str | Sequence[str]:
        """Return a command of the test's as it is run, with the directory and the environment that this kind of guest gives it."""
        return command

    def told_otherwise(self, words: Sequence[str], directory: Path) -> VmConfig | None:
        """Return the config of a guest that is told these words by a file in `directory`; None: by its kernel command line."""
        return None

    @abstractmethod
    def own_words(self) -> list[str]:
        """Return what only this kind of guest is told."""

    @abstractmethod
    def boot_words(self, marker: str, networks: list[str]) -> list[str]:
        """Return what is added to the kernel command line of a boot; `networks` are the words of its NICs."""

    @abstractmethod
    def clone_key(self, marker: str) -> list[str]:
        """Return what distinguishes its template from those of other kinds of guest with the same files."""

    @abstractmethod
    def why_no_clone(self, network_mode: str) -> str | None:
        """Return why it has to be booted, or None where it can be a clone; `network_mode`: see `Plan.network`."""

    @abstractmethod
    def with_new_nonce(self, config: VmConfig) -> Guest:
        """Return the guest with another config, and a nonce of its own where the ready line of a boot has one."""

    @abstractmethod
    def mount_line(self, share: SharedDir) -> str:
        """Return the shell line that mounts a shared dir which was plugged in again. Of a guest whose shares are unplugged only."""

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

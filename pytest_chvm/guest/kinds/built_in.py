"""The built-in guest: our initramfs, with a kernel of ours or the user's."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from pytest_chvm.base.progress import Progress
from pytest_chvm.base.untouched import random_hex
from pytest_chvm.guest.initramfs import Entry
from pytest_chvm.guest.kernels.kernel import Kernel
from pytest_chvm.guest.kinds import Guest, Run
from pytest_chvm.guest.renewal import why_not_renewed
from pytest_chvm.model import SharedDir, VmConfig

# Has its shell read what sets the guest up; before it is saved too, so that a clone's does not have to.
READ_SET_UP = ". /lib/chvm/configure.sh"
PUT_MODULES_AWAY = f"{READ_SET_UP}; chvm_put_modules_away"
SHOW_MODULES = f"{READ_SET_UP}; chvm_show_modules"
MODULES_WORD = "chvm.modules=disk"


@dataclass(frozen=True, slots=True)
class BuiltInGuest(Guest):
    """The built-in guest, which has all that renews it."""

    cloned_at_once: ClassVar[bool] = True
    reads_words_of_file: ClassVar[bool] = True
    takes_host_libraries: ClassVar[bool] = True
    warns_on_console: ClassVar[bool] = True
    keeps_boot_id_unread: ClassVar[bool] = True
    # What its initramfs has beside that of the built-in guest.
    more_modules: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def more_files(_kernel: Kernel, _cache: Path, _progress: Progress) -> Sequence[Entry]:
        """Return likewise the files, for a kernel."""
        return ()

    def own_words(self) -> list[str]:
        """Return its host name; an image has its own."""
        return [f"chvm.hostname={self.config.name.replace('_', '-').replace('.', '-')}"]

    def words(self, marker: str) -> list[str]:
        """Return all that it is told; where its modules were put away for disks, behind those, that it is to bring them back."""
        modules = [MODULES_WORD] if self.modules_disk is not None and self.plugs_disks else []
        return [*Guest.words(self, marker), *modules]

    def boot_words(self, marker: str, networks: list[str]) -> list[str]:
        """Return all its words; a clone is not told of the modules that its template has loaded."""
        modules = [MODULES_WORD] if self.modules_disk is not None else []
        return [*modules, *self.load_words, *self.words(marker), *networks]

    def clone_key(self, _marker: str) -> list[str]:
        """Return its name and its modules: each clone is told what it says when it is ready."""
        return ["built-in", str(self.modules_disk), *self.load_words, *(["plugs disks"] if self.plugs_disks else [])]

    def why_no_clone(self, _network_mode: str) -> str | None:
        """Return why nothing could renew it; all that it does with its devices it can do again."""
        return why_not_renewed(self.config.architecture)

    def with_new_nonce(self, config: VmConfig) -> BuiltInGuest:
        """Return it with a nonce that nothing has printed yet."""
        return replace(self, config=config, nonce=random_hex(8))

    def mount_line(self, share: SharedDir) -> str:
        """Return what its init does with a shared dir."""
        return f"{READ_SET_UP}; chvm_share {shlex.quote(share.guest_word)}"

    def set_up_for_saving(self, _run: Run, _ip: Callable[[], str], _told: Sequence[str], *, trial: bool) -> str:
        """Return what reads its set-up; one of which only clones come also waits for the clock source that they will have.

        Where they have disks plugged in, its disk of modules has no name meanwhile.
        """
        away = "; chvm_put_modules_away" if self.plugs_disks else ""
        return f"{READ_SET_UP}{away}; chvm_settle" if trial else READ_SET_UP

    def nonce_after_reboot(self, nonce: str | None) -> str | None:
        """Return the same: it is on its kernel command line."""
        return nonce

    def sets_clock(self, *, shell_was_used: bool) -> bool:
        """Return True: its shell always answers."""
        return True

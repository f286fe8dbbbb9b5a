"""Processor architectures: what differs between a guest of one and of another, in one place.

What a VMM's machine of an architecture is made of is known to its driver, which programs for the guest there are to `guest.elf`.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

from pytest_chvm.errors import InvalidConfigError


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture by the name that `uname -m` has for it; `debian` is the one that Debian has.

    `serial` is the serial port of VMMs' machines, as the guest calls it. `quick_words` are what a throwaway guest can do without, as
    words of the kernel command line. `early_console` are those by which a kernel writes to the port before it has a driver for it,
    also after another console takes over. `cmdline_bytes`: how long a command line kernels take whose image does not say
    (COMMAND_LINE_SIZE, less the final NUL).
    """

    name: str
    debian: str
    serial: str
    quick_words: str = ""
    early_console: str = "earlycon keep_bootcon"
    cmdline_bytes: int = 2047

    @property
    def console_word(self) -> str:
        """The word of a kernel command line that names the serial port."""
        return f"console={self.serial}"

    @property
    def is_host(self) -> bool:
        """Whether it is this machine's."""
        return self.name == platform.machine()


ARCHITECTURES = {
    each.name: each
    for each in (
        # Looking for a timer that is known, and page tables of five levels, which software walks for each guest address it has
        # not seen lately.
        Architecture("x86_64", "amd64", "ttyS0", "no5lvl no_timer_check", "earlyprintk=ttyS0,115200,keep"),
        Architecture("aarch64", "arm64", "ttyAMA0"),
        # arch/riscv/include/uapi/asm/setup.h, before Linux 6.4 without that file: 512.
        Architecture("riscv64", "riscv64", "ttyS0", cmdline_bytes=511),
    )
}


def architecture(name: str | None) -> Architecture:
    """Return an architecture by its name, None: this machine's. Raises InvalidConfigError for a name that is not known."""
    if name is None:
        machine = platform.machine()
        return ARCHITECTURES.get(machine) or Architecture(machine, machine, "ttyS0")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        meant = [each.name for each in ARCHITECTURES.values() if name == each.debian]
        raise InvalidConfigError(f"arch={name!r}, expected {meant[0]!r}" if meant else f"arch={name!r}, expected one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]

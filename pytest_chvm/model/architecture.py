"""Processor architectures: what differs between a guest of one and of another, in one place.

What a VMM's machine of an architecture is made of is known to its driver, which programs for the guest there are to `guest.elf`.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture by the name that `uname -m` has for it; `debian` is the one that Debian has.

    `serial` is the serial port of VMMs' machines, as the guest calls it; `serial_option` the option of a kernel's configuration
    that gives it a console there. `quick_words` are what a throwaway guest can do without, as words of the kernel command line.
    `early_console` are those by which a kernel writes to the port before it has a driver for it, also after another console takes
    over. `cmdline_bytes`: how long a command line kernels take whose image does not say (COMMAND_LINE_SIZE, less the final NUL).
    """

    name: str
    debian: str
    serial: str
    serial_option: str = "SERIAL_8250_CONSOLE"
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
        Architecture(
            "x86_64", "amd64", "ttyS0", quick_words="no5lvl no_timer_check", early_console="earlyprintk=ttyS0,115200,keep"
        ),
        Architecture("aarch64", "arm64", "ttyAMA0", "SERIAL_AMBA_PL011_CONSOLE"),
        # arch/riscv/include/uapi/asm/setup.h, before Linux 6.4 without that file: 512.
        Architecture("riscv64", "riscv64", "ttyS0", cmdline_bytes=511),
    )
}


def architecture(name: str | None) -> Architecture:
    """Return an architecture by its name, None: this machine's. Of one that is not known the usual is assumed."""
    name = platform.machine() if name is None else name
    return ARCHITECTURES.get(name) or Architecture(name, name, "ttyS0")


def why_no_architecture(name: object) -> str | None:
    """Return what is wrong with a name of an architecture, or None where it is one that can be asked for."""
    if name is None or name in ARCHITECTURES:
        return None
    meant = next((each.name for each in ARCHITECTURES.values() if name == each.debian), None)
    expected = repr(meant) if meant else f"one of {', '.join(ARCHITECTURES)}"
    return f"arch={name!r}, expected {expected}"

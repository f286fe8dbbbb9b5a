"""Renewal: how a clone becomes a machine of its own. A program that already runs in the saved guest does it, then a shell line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Protocol

from pytest_chvm.base.untouched import random_bytes, wall_clock_ns, wall_clock_s
from pytest_chvm.errors import GuestCommandError, UnsupportedError, VmIOError
from pytest_chvm.guest import elf, renew
from pytest_chvm.model import Architecture, CommandResult

CLOCK_TIMEOUT_S = 5.0
# A directory of ours in a guest.
DIRECTORY = re.compile(r"/[a-z/]{1,20}/chvm\.[A-Za-z0-9]{6}\n")
# Puts the program that is its input where the guest runs programs from, and tries it: without a message it ends with 1.
INSTALL = """\
[ "$(id -u)" = 0 ] || { echo "the shell on its console is not root's"; exit 3; }
[ -x /run/chvm/busybox ] || command -v ip >/dev/null || { echo "it has no 'ip' (iproute2, BusyBox)"; exit 3; }
for place in /run /tmp /var/tmp /root /dev; do
    directory=$(mktemp -d $place/chvm.XXXXXX 2>/dev/null) || continue
    if [ "$program" ]; then cp $program $directory/renew; else cat >$directory/renew; fi
    program=$directory/renew
    chmod 700 $program
    $program </dev/null >/dev/null 2>&1
    [ $? = 1 ] && echo $directory && exit
done
echo "it runs no program of ours from /run, /tmp, /var/tmp, /root or /dev"
exit 3
"""


def waiting_line(set_up: str, token: str) -> str:
    """Return the shell line after which a guest can be saved: it waits for its renewal, after a line `TOKEN waits`.

    `set_up` reads the set-up that makes it a machine of its own.
    """
    return f"{set_up}; chvm_renewed=; printf '\\n{token} ' >/dev/hvc0; $chvm_renew </dev/hvc0 >/dev/hvc0 && chvm_renewed=1"


def why_not_renewed(arch: Architecture) -> str | None:
    """Return why nothing can renew a clone of a guest of an architecture, or None where something can."""
    if arch.name in elf.WRITTEN_FOR:
        return None
    written_for = " and ".join(elf.WRITTEN_FOR)
    return f"the program that makes a clone a machine of its own is written for {written_for}, and not for {arch.name}"


def line(words: Sequence[str], *, stale_nics: int = 0) -> str:
    """Return the shell line that makes a renewed clone a machine of its own, which then says that it is ready.

    `words` are those of the built-in guest's kernel command line. `stale_nics`: how many NICs have the snapshot's addresses.
    """
    flush = "".join(f"ip addr flush dev eth{index};" for index in range(stale_nics))
    # A clone whose pool is the template's must not be ready.
    return f"[ $chvm_renewed ] && {{ {flush}chvm_configure {shlex.join(words)}; }}"


def host_key_word(key_type: str, private: str, public: str) -> str:
    """Return the word by which a clone is told a new SSH host key, as configure_any.sh reads it: the lines of its two files."""
    lines = [line for line in private.splitlines() if not line.startswith("-----")]
    return f"chvm.ssh_key={','.join([key_type, public, *lines])}"


def message() -> bytes:
    """Return the message for the program: the time now, and a seed."""
    return renew.message(wall_clock_ns(), random_bytes(renew.SEED_SIZE))


class _Run(Protocol):
    def __call__(self, command: str, *, timeout: float, input: bytes | None) -> CommandResult: ...


def set_clock(run: _Run) -> None:
    """Set the guest's clock to the host's, late by the command's duration, and by up to a second where there is no renewal program.

    Raises GuestCommandError where it cannot.
    """
    program = "/lib/chvm/renew"
    script = f"if [ -x {program} ]; then {program} >/dev/null; else date -u -s @{round(wall_clock_s())} >/dev/null; fi"
    done = run(script, timeout=CLOCK_TIMEOUT_S, input=renew.call("0" * renew.TOKEN_SIZE) + message())
    if done.returncode != 0:
        raise GuestCommandError(f"its shell could not set it: {done.stderr.strip()[:200]!r}, status {done.returncode}")


def set_up_script() -> bytes:
    """Return what the console shell of an image of one's own reads before it is saved, as the built-in guest's reads another."""
    return resources.files("pytest_chvm.guest").joinpath("configure_any.sh").read_bytes()


def put_into(
    run: Callable[[str, bytes | None], CommandResult], ip: str, words: Sequence[str], arch: Architecture, *, trial: bool
) -> str:
    """Put what renews clones into a guest that is not ours; returns the line by which its console shell reads it.

    `run` runs a command in the guest, of an architecture, with an input. `ip` is what the guest says that its address is, `words`
    what it was told. `trial`: renew the guest itself, once. Raises UnsupportedError where clones could not be renewed or would be
    otherwise than it.
    """
    if (why := why_not_renewed(arch)) is not None:
        raise UnsupportedError(why)
    told = [word.removeprefix("chvm.ip=") for word in words if word.startswith("chvm.ip=")] or ["127.0.0.1"]
    if ip != told[-1]:
        raise UnsupportedError(f"it says that its address is {ip}, and was told {told[-1]}: its clones would say that")
    networks = [word for word in words if word.startswith("chvm.net=")]
    try:
        done = run(INSTALL, renew.program(arch))
        if done.returncode == 0 and DIRECTORY.fullmatch(done.stdout):
            directory = done.stdout.strip()
            steps: list[tuple[str, bytes | None]] = [(f"cat >{directory}/configure.sh", set_up_script())]
            steps += [(f". {directory}/configure.sh; chvm_check {shlex.join(networks)}", None)]
            # A clone that it cannot renew would never say that it is ready.
            steps += [(f"{directory}/renew", renew.call("0" * renew.TOKEN_SIZE) + message())] if trial else []
            for command, data in steps:
                done = run(command, data)
                if done.returncode != 0:
                    break
            else:
                return f"chvm_renew={directory}/renew; . {directory}/configure.sh; chvm_prepare"
    except (VmIOError, GuestCommandError) as error:
        raise UnsupportedError(f"nothing can renew its clones: {error}") from error
    said = (done.stdout + done.stderr).strip()[:200]
    raise UnsupportedError(f"nothing can renew its clones: {said!r}, status {done.returncode}")

"""Scripts by which a guest waits for something of its own: the loop runs there, so that nobody asks over and over from outside.

Each ends with 0 when what is waited for is there, and is ended by who started it when that takes too long.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

# BusyBox, coreutils; elsewhere a sleep may know whole seconds only.
PAUSE = "sleep 0.1 2>/dev/null || sleep 1"
# Of a socket in /proc/net/tcp and tcp6 (proc(5)): its address, the other end's, and that it listens.
LISTENS = r"^ *[0-9]*: [0-9A-F]*:%s [0-9A-F]*:0000 0A "
LISTENING = re.compile(r"^ *\d+: [0-9A-F]+:([0-9A-F]{4}) [0-9A-F]+:0000 0A ", re.M)
# What the script of a unit ends with where waiting makes no sense.
FAILED, NO_UNIT, NO_SYSTEMD = 3, 4, 5


@dataclass(frozen=True, slots=True)
class Attempts:
    """A script that is run again until it succeeds; `token` is in the name of the directory where its last outputs are."""

    script: str
    token: str

    @property
    def _directory(self) -> str:
        return f"/tmp/chvm.{self.token}"

    def wait_script(self) -> str:
        """Return what runs it until it succeeds, and then has its outputs."""
        return (
            f"umask 077; d={self._directory} n=0; mkdir $d || exit 1; trap 'rm -rf $d' EXIT\n"
            f"until sh -c {shlex.quote(self.script)} >$d/$n.out 2>$d/$n.err; do\n"
            f'    echo "$n $?" >$d/last; n=$((1 - n)); {PAUSE}\n'
            "done\n"
            "cat $d/$n.out; cat $d/$n.err >&2"
        )

    def last_script(self) -> str:
        """Return what prints the outputs of the last attempt that ended and removes what is left; it returns that one's status.

        Where none has ended, the outputs are those of the first one so far, and the status is 0.
        """
        return (
            f"cd {self._directory} || exit 0; n=0 status=0; [ -e last ] && read -r n status <last\n"
            f"cat $n.out; cat $n.err >&2; cd /; rm -rf {self._directory}; exit $status"
        )


def port_script(port: int) -> str:
    """Return what waits until something in the guest listens at a TCP port, at whatever address of the guest's."""
    pattern = LISTENS % f"{port:04X}"
    return f"until grep -qs '{pattern}' /proc/net/tcp /proc/net/tcp6; do {PAUSE}; done"


def open_ports(tables: str) -> list[int]:
    """Return the ports at which something listens, by `/proc/net/tcp` and `tcp6`."""
    return sorted({int(port, 16) for port in LISTENING.findall(tables)})


def file_script(path: str) -> str:
    """Return what waits until there is a file, a directory or whatever else of that name; a link's target counts."""
    return f"until [ -e {shlex.quote(path)} ]; do {PAUSE}; done"


def nearest_script(path: str) -> str:
    """Return what lists the nearest directory above a path that is there, and what is in it."""
    above = f'd={shlex.quote(path)}; while [ "$d" != / ] && [ "$d" != . ] && [ ! -d "$d" ]; do d=$(dirname -- "$d"); done'
    return f'{above}; ls -ld "$d"; ls -lA "$d" | head -n 50'


def unit_script(name: str) -> str:
    """Return what waits until a systemd unit is active, or one of type oneshot has ended well.

    It ends with FAILED when the unit has failed, NO_UNIT where there is none of that name, NO_SYSTEMD.
    """
    unit = shlex.quote(name)
    return f"""command -v systemctl >/dev/null && [ -d /run/systemd/system ] || exit {NO_SYSTEMD}
show="systemctl show -p LoadState,ActiveState,Type"
began=
while :; do
    state=$($show -- {unit}) || exit {NO_SYSTEMD}
    case $state in
    *ActiveState=active*) exit 0 ;;
    *ActiveState=failed*) exit {FAILED} ;;
    *LoadState=not-found*) exit {NO_UNIT} ;;
    *ActiveState=activating*) began=1 ;;
    # One that has ended well; systemd soon forgets that it has run.
    *ActiveState=inactive*) case $state in *Type=oneshot*) [ $began ] && exit 0 ;; esac ;;
    esac
    {PAUSE}
done"""


def unit_state_script(name: str) -> str:
    """Return what prints a unit's status and the end of its journal."""
    unit = shlex.quote(name)
    return (
        f"systemctl status --no-pager --full --lines 0 -- {unit}\n"
        f"journalctl --no-pager --unit {unit} --lines 50 --output short-monotonic"
    )

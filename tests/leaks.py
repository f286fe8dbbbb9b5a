"""What a run left behind on the host: a snapshot before, one after, and a sandbox in which all that is new is that run's.

The sandbox is a set of Linux namespaces with an empty `/run` and `/dev/shm` and no links but loopback, so that tests beside
this one, and runs beside this one, are not seen.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pytest_chvm.base.deadline import Deadline, wait_readable

GONE_WITHIN_S = 2.0
# On the host as a whole other processes come and go: there, these are looked for.
PROGRAMS = ("qemu", "virtiofsd", "cloud-hypervisor", "keeper.py")
PLACES = ("/run/pytest-chvm", "/run/lock/pytest-chvm", "/run/netns", "/dev/shm")

_SANDBOX_SETUP = """
set -e
mount -t tmpfs -o mode=0755 run /run
mkdir -m 1777 /run/lock
mount -t tmpfs -o mode=1777 shm /dev/shm
# What is left among temporary files is seen too: see TMPDIR.
mkdir -m 1777 /run/tmp
# The one there is shows the links of the network namespace it was mounted in.
mount -t sysfs sys /sys
ip link set lo up
echo ready
exec cat
"""


@dataclass(frozen=True)
class Snapshot:
    """What there is: one line each, and the pids among it."""

    things: frozenset[str]
    pids: frozenset[int]

    def __sub__(self, before: Snapshot) -> Snapshot:
        return Snapshot(self.things - before.things, self.pids - before.pids)

    def __bool__(self) -> bool:
        return bool(self.things)

    def __str__(self) -> str:
        return "\n".join(sorted(self.things))


def snapshot(pid: int, programs: Iterable[str] | None = PROGRAMS, places: Iterable[str] = PLACES) -> Snapshot:
    """Return what there is where a process lives; `programs=None` counts every process but itself.

    Processes come first: once nobody is left who could clean up, what is still there stays.
    """
    pids = {}
    for other in _processes_beside(pid):
        command = _command_line(other)
        if command and (programs is None or any(program in command for program in programs)):
            pids[other] = f"process {other} {command}"
    things = [*pids.values()]
    things += (f"link {name}" for name in _links(pid))
    things += (f"mount {line.split()[1]}" for line in Path(f"/proc/{pid}/mounts").read_text().splitlines())
    for place in places:
        things += (f"file {path}" for path in _files(pid, place))
    return Snapshot(frozenset(things), frozenset(pids))


def _processes_beside(pid: int) -> Iterator[int]:
    # Unlike the mount and network namespaces, `ip netns exec` and virtiofsd's sandbox do not leave this one.
    try:
        home = os.readlink(f"/proc/{pid}/ns/uts")
    except OSError:
        # It has just gone; nobody can tell who was beside it.
        return
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and int(entry) != pid and os.readlink(f"/proc/{entry}/ns/uts") == home:
                yield int(entry)
        except OSError:
            continue


def _command_line(pid: int) -> str:
    """Return a process's command line; empty for one that is gone, or is a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _links(pid: int) -> list[str]:
    lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    return [line.split(":")[0].strip() for line in lines]


def _files(pid: int, place: str) -> Iterator[str]:
    root = f"/proc/{pid}/root"
    for directory, directories, names in os.walk(root + place):
        yield from (os.path.join(directory, name).removeprefix(root) for name in [*directories, *names])
    if os.path.lexists(root + place):
        yield place


class Sandbox:
    """Namespaces of a run's own; needs root, or user namespaces. A context manager."""

    def __enter__(self) -> Self:
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        self._holder = subprocess.Popen(
            ["unshare", *user, "--net", "--mount", "--uts", "sh", "-c", _SANDBOX_SETUP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n", "the sandbox cannot be made: see standard error"
        self.take_for_granted()
        return self

    def __exit__(self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None) -> None:
        for pid in self._look().pids:
            os.kill(pid, 9)
        self._holder.communicate()

    def command(self, *argv: str | os.PathLike[str], cwd: str | os.PathLike[str] = "/") -> list[str]:
        """Return what runs a program inside, in a process that becomes that program."""
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        inside = ["nsenter", "--target", str(self._holder.pid), *user, "--net", "--mount", "--uts"]
        # Entering a mount namespace changes to its root. A program has its signals as from a terminal, whatever these tests were
        # started by (nohup ignores some).
        program = f'cd {shlex.quote(os.fspath(cwd))} && exec env --default-signal "$@"'
        return [*inside, "sh", "-c", program, "sh", *map(os.fspath, argv)]

    def run(self, *argv: str | os.PathLike[str]) -> None:
        """Run a program inside; it must succeed."""
        subprocess.run(self.command(*argv), check=True, timeout=120)

    def links(self) -> list[str]:
        """Return the names of the network interfaces inside."""
        return _links(self._holder.pid)

    def path(self, inside: str) -> Path:
        """Return where an absolute path of the inside is seen from outside."""
        return Path(f"/proc/{self._holder.pid}/root{inside}")

    def processes(self) -> dict[int, str]:
        """Return the command lines of the processes inside that were not there at first."""
        return {pid: _command_line(pid) for pid in (self._look() - self._before).pids}

    def take_for_granted(self) -> None:
        """Have what is there now not count as left behind."""
        self._before = self._look()

    def left_behind(self, *, timeout_s: float = GONE_WITHIN_S, but: Iterable[int] = ()) -> Snapshot:
        """Return what is there that was not at first, once the processes among it have ended or the time is over.

        `but`: processes that may stay.
        """
        deadline = Deadline.after(timeout_s)
        spared = frozenset(but)
        while True:
            extra = self._look(spared) - self._before
            if not extra.pids or deadline.expired:
                return extra
            _wait_for_ends(extra.pids, deadline)

    def _look(self, spared: frozenset[int] = frozenset()) -> Snapshot:
        found = snapshot(self._holder.pid, programs=None, places=("/run", "/dev/shm"))
        lines = frozenset(line for line in found.things if not any(line.startswith(f"process {pid} ") for pid in spared))
        return Snapshot(lines, found.pids - spared)


def _wait_for_ends(pids: Iterable[int], deadline: Deadline) -> None:
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        wait_readable([pidfd], deadline)
        os.close(pidfd)

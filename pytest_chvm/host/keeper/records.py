"""The records of a process's VMs, read strictly, and the removal of what a dead process left.

Standard library only, and of this package only what is so too: the keeper runs it. Each process that has VMs has a
directory below the runtime directory:

    owner.json      who it is: {"boot_id", "pid", "start_time_ticks", "run", "worker"}
    lock            locked as long as its keeper lives; the pid and start time of both of the keeper's processes
    NUMBER/         the *lease* of one VM or network: its sockets and disks, and
        processes   the pid and start time of each process started for it, a line each, before it is what it is to be
        lease.json  what it has elsewhere, written before that is made, and what is to be known of it:
                    {"taps": [{"name", "netns"}], "bridges": [], "paths": [], "locks": [], "vm": {...}}

A directory whose lock is held, or whose owner lives, is somebody's and is left alone. What cannot be removed keeps its record.
"""

from __future__ import annotations

import os
import stat
import time

if __name__ == "records":
    # For the keeper, which runs without its package.
    import lockfiles  # type: ignore[import-not-found]
    import remains  # type: ignore[import-not-found]
    import trees  # type: ignore[import-not-found]
else:
    from pytest_chvm.base import lockfiles, trees
    from pytest_chvm.host.keeper import remains

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

OWNER_FILE = "owner.json"
LEASE_FILE = "lease.json"
LOCK_FILE = "lock"
PROCESSES_FILE = "processes"
LARGEST_RECORD = 1 << 20
KILLED_TIMEOUT_S = 1.5
# The owner of a directory without a record was killed before it wrote one, or is about to write it.
BIRTH_S = 60.0
# linux/time.h
CLOCK_REALTIME_COARSE = 5


def read_record(path: str) -> dict[str, Any]:
    """Return a record; raises ValueError, in words, for malformed ones, and OSError where it cannot be read."""
    import json

    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("it is no file")
        raw = file.read(LARGEST_RECORD + 1)
    if len(raw) > LARGEST_RECORD:
        raise ValueError(f"it is larger than {LARGEST_RECORD} bytes")
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    return record


def read_owner(directory: str) -> dict[str, Any]:
    """Return the record of a directory's owner; raises ValueError or OSError."""
    owner = read_record(os.path.join(directory, OWNER_FILE))
    for key, kind in (("boot_id", str), ("pid", int), ("start_time_ticks", int), ("run", str), ("worker", str)):
        if type(owner.get(key)) is not kind:
            raise ValueError(f"it has no {key}")
    return owner


def read_lease(directory: str) -> dict[str, Any]:
    """Return the record of a lease, empty where there is none yet; raises ValueError or OSError."""
    try:
        lease = read_record(os.path.join(directory, LEASE_FILE))
    except FileNotFoundError:
        return {}
    for key in ("taps", "bridges", "paths", "locks"):
        if not isinstance(lease.setdefault(key, []), list):
            raise ValueError(f"{key} is no list")
    if not isinstance(lease.setdefault("vm", {}), dict):
        raise ValueError("vm is no object")
    for tap in lease["taps"]:
        if not isinstance(tap, dict) or not isinstance(tap.get("netns"), str | None):
            raise ValueError(f"{tap!r} is no TAP")
        if tap.get("netns") is not None and not _is_plain_name(tap["netns"], 255):
            raise ValueError(f"{tap['netns']!r} is no network namespace")
    for name in [tap.get("name") for tap in lease["taps"]] + lease["bridges"]:
        # Given to ip(8).
        if not _is_plain_name(name, 15):
            raise ValueError(f"{name!r} is no interface")
    for entry in lease["paths"] + lease["locks"]:
        if not isinstance(entry, str) or "\0" in entry or not os.path.isabs(entry) or not os.path.normpath(entry).strip("/"):
            raise ValueError(f"{entry!r} is no absolute path")
    return lease


def _is_plain_name(name: object, longest: int) -> bool:
    return isinstance(name, str) and 0 < len(name) <= longest and not name.startswith(("-", ".")) and not set(name) & set("/ \0\n")


def read_pairs(path: str) -> dict[int, int]:
    """Return pid and start time from each line of a file; malformed lines are skipped, and a missing file has no lines."""
    try:
        with open(path, "rb") as file:
            lines = file.read(LARGEST_RECORD).split(b"\n")
    except OSError:
        return {}
    pairs = [line.split() for line in lines]
    return {int(pair[0]): int(pair[1]) for pair in pairs if [word.isdigit() and len(word) < 20 for word in pair] == [True, True]}


def leases_of(directory: str) -> list[str]:
    """Return the directories of an owner's leases; empty where the owner's directory is gone."""
    try:
        paths = [os.path.join(directory, entry) for entry in sorted(os.listdir(directory))]
    except FileNotFoundError:
        return []
    return [path for path in paths if os.path.isdir(path) and not os.path.islink(path)]


def processes_of(lease: str) -> dict[int, int]:
    """Return pid and start time of the living processes of a lease."""
    found: dict[int, int] = remains.processes_of_sessions(read_pairs(os.path.join(lease, PROCESSES_FILE)), lease)
    return found


def remove_lease(place: str | os.PathLike[str], *, search: bool = True, same_boot: bool = True) -> list[str]:
    """End and remove all that a lease names, and its directory; returns what could not be removed, in words.

    With `search` its processes are ended too. Each step is tried whatever became of those before it, and what is already gone is
    no failure. Of another boot there are no processes and no interfaces. The record stays if something else does.
    """
    directory = os.fspath(place)
    if trees.is_mount_point(os.path.dirname(directory)):
        # Another process than the recorded one has the pid.
        return [trees.mounted_on(os.path.dirname(directory))]
    failures = []
    if search and same_boot:
        failures += [f"process {pid} outlived SIGKILL" for pid in remains.kill_and_wait(processes_of(directory), KILLED_TIMEOUT_S)]
    try:
        lease = read_lease(directory)
    except (OSError, ValueError) as error:
        # A damaged record stays damaged.
        return [
            *failures,
            f"{directory}/{LEASE_FILE} cannot be read ({error}): what it named is left",
            *trees.remove_tree(directory),
        ]
    failures += remove_named(lease, same_boot=same_boot)
    if not failures:
        failures += trees.remove_tree(directory)
        return failures
    failures += trees.remove_tree(directory, keep=(LEASE_FILE, PROCESSES_FILE))
    return failures


def remove_named(lease: dict[str, Any], *, same_boot: bool = True) -> list[str]:
    """Remove what a record of a lease names; returns what could not be removed, in words."""
    failures = []
    for tap in lease.get("taps", ()) if same_boot else ():
        failures += remains.remove_tap(tap["name"], tap.get("netns"))
    for bridge in lease.get("bridges", ()) if same_boot else ():
        failures += remains.remove_bridge(bridge)
    for path in lease.get("paths", ()):
        failures += trees.remove_tree(path)
    for path in lease.get("locks", ()):
        failures += lockfiles.remove_free_lock(path)
    return failures


def left_of(lease: str) -> list[str]:
    """Return what of a lease is still there, in words; nothing where its directory is gone."""
    if not os.path.isdir(lease):
        return []
    left = [f"process {pid} ({_program(pid)})" for pid in processes_of(lease)]
    try:
        record = read_lease(lease)
    except (OSError, ValueError) as error:
        return [*left, f"{lease}, whose record cannot be read: {error}"]
    left += [f"TAP {tap['name']}" for tap in record.get("taps", ()) if remains.interface_is_there(tap["name"], tap["netns"])]
    left += [f"bridge {name}" for name in record.get("bridges", ()) if remains.interface_is_there(name, None)]
    left += [path for path in record.get("paths", ()) if os.path.lexists(path)]
    return [*left, lease]


def _program(pid: int) -> str:
    words: list[str] = [*remains.command_line(pid), ""]
    return os.path.basename(words[0])


def remove_owner_directory(directory: str, *, same_boot: bool = True) -> list[str]:
    """Remove all that the leases of an owner's directory name, and it; returns what could not be removed, in words."""
    if trees.is_mount_point(directory):
        return [trees.mounted_on(directory)]
    failures = []
    for lease in leases_of(directory):
        failures += remove_lease(lease, same_boot=same_boot)
    if not leases_of(directory):
        failures += trees.remove_tree(directory)
    return failures


def is_abandoned(directory: str, owner: dict[str, Any]) -> bool:
    """Tell whether both the owner of a directory and its keeper are gone."""
    if owner["boot_id"] == remains.boot_id() and remains.start_time_ticks(owner["pid"]) == owner["start_time_ticks"]:
        return False
    # Without a lock file the owner died before its keeper had started.
    return not lockfiles.is_locked(os.path.join(directory, LOCK_FILE))


def remove_abandoned(runtime_dir: str | os.PathLike[str], *, dry_run: bool = False) -> tuple[list[str], list[str]]:
    """Remove what processes left whose keeper and owner are both gone; returns what was removed and what could not be, in words."""
    removed: list[str] = []
    failures: list[str] = []
    try:
        names = sorted(os.listdir(runtime_dir))
    except FileNotFoundError:
        return removed, failures
    for name in names:
        directory = os.path.join(os.fspath(runtime_dir), name)
        try:
            if os.path.islink(directory) or not os.path.isdir(directory):
                raise ValueError("it is no directory")
            if _was_stillborn(directory):
                removed.append(directory)
                failures += [] if dry_run else trees.remove_tree(directory)
                continue
            owner = read_owner(directory)
            if not is_abandoned(directory, owner):
                continue
            removed += [what for lease in leases_of(directory) for what in left_of(lease) if not what.startswith(directory)]
            removed.append(directory)
            if not dry_run:
                failures += remove_owner_directory(directory, same_boot=owner["boot_id"] == remains.boot_id())
        except FileNotFoundError:
            # Its owner is making it, or removing it, just now.
            continue
        except (OSError, ValueError) as error:
            failures.append(f"{directory} is not understood ({error}): it is left as it is")
    return removed, failures


def _was_stillborn(directory: str) -> bool:
    """Tell whether the owner of a directory died before it had written who it is."""
    record = os.path.join(directory, OWNER_FILE)
    if os.listdir(directory) not in ([], [OWNER_FILE]) or (os.path.exists(record) and os.path.getsize(record)):
        return False
    # By the clock of file times, which no test freezes; if it was set back, the directory is left for a later look.
    return time.clock_gettime(CLOCK_REALTIME_COARSE) - os.stat(directory).st_mtime > BIRTH_S

"""What a VM leaves on the host, and how to remove it, for those who outlive it.

Standard library only, as little of it as possible, and nothing of this package: the keeper, which must start in
milliseconds and stay small, runs it as well as the process that owns the VM.

Each VM has a *lease*: a directory of its own below the directory of the process that owns it, with a file
`lease.json` that names what lives elsewhere. It is written before anything of that is made:

    {"taps": [{"name": ..., "netns": ...}], "bridges": [...], "paths": [...], "locks": [...]}
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import time

LEASE_FILE = "lease.json"
COMMAND_TIMEOUT_S = 2.0


def boot_id() -> str:
    """Return the host's boot id (random(4)): pids and start times mean something within one boot only."""
    return _read("/proc/sys/kernel/random/boot_id").decode().strip()


def start_time_ticks(pid: int) -> int | None:
    """Return field 22 of `/proc/PID/stat` (proc(5)); None where there is no such process, or only a zombie."""
    try:
        stat = _read(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name, field 2, is in parentheses and may contain spaces and parentheses itself.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def command_line(pid: int) -> tuple[str, ...]:
    """Return a process's arguments; empty where it is gone."""
    try:
        raw = _read(f"/proc/{pid}/cmdline")
    except (FileNotFoundError, ProcessLookupError):
        return ()
    return tuple(os.fsdecode(word) for word in raw.rstrip(b"\0").split(b"\0"))


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def processes_naming(directory: str | os.PathLike[str]) -> list[int]:
    """Return the pids of this user's processes that have a path below `directory` in an argument."""
    needle = os.fspath(directory) + "/"
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                if any(needle in word for word in command_line(int(entry))):
                    found.append(int(entry))
            except PermissionError:
                continue
    return found


def kill_and_wait(pids: list[int], timeout_s: float) -> list[int]:
    """SIGKILL processes, by pidfd, and wait for their end; returns those still there at the deadline."""
    deadline = time.monotonic() + timeout_s
    descriptors = {}
    for pid in pids:
        try:
            descriptors[pid] = os.pidfd_open(pid)
            signal.pidfd_send_signal(descriptors[pid], signal.SIGKILL)
        except ProcessLookupError:
            continue
    survivors = [pid for pid, fd in descriptors.items() if not pidfd_ended(fd, deadline - time.monotonic())]
    for fd in descriptors.values():
        os.close(fd)
    return survivors


def pidfd_ended(pidfd: int, timeout_s: float) -> bool:
    """Wait for a process to end (a zombie has ended); tells whether it did within the time."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0, timeout_s * 1000)))


def remove_lease(directory: str | os.PathLike[str], *, search: bool = True) -> list[str]:
    """End and remove all that a lease names, and its directory; returns what could not be removed, in words.

    With `search` the processes that name the directory are ended too. Each step is tried whatever became of those before
    it. What is already gone is no failure.
    """
    place = os.fspath(directory)
    failures = []
    if search:
        failures += [f"process {pid} outlived SIGKILL" for pid in kill_and_wait(processes_naming(place), COMMAND_TIMEOUT_S)]
    try:
        lease = _read_lease(os.path.join(place, LEASE_FILE))
    except (OSError, ValueError, KeyError, TypeError) as error:
        failures.append(f"{place}/{LEASE_FILE} cannot be read ({error}): what it named is left")
        lease = {}
    for tap in lease.get("taps", ()):
        failures += remove_tap(tap["name"], tap.get("netns"))
    for bridge in lease.get("bridges", ()):
        failures += _run_ip(None, "link", "del", "dev", bridge, absent="Cannot find device")
    for path in lease.get("paths", ()):
        failures += remove_tree(path)
    for path in lease.get("locks", ()):
        failures += remove_free_lock(path)
    return failures + remove_tree(place)


def _read_lease(path: str) -> dict[str, list]:  # type: ignore[type-arg]
    import json

    try:
        lease = json.loads(_read(path))
    except FileNotFoundError:
        return {}
    for name in [tap["name"] for tap in lease.get("taps", ())] + lease.get("bridges", []):
        # Read from a file, and given to ip(8).
        if not isinstance(name, str) or not name or name.startswith("-") or "/" in name or len(name) > 15:
            raise ValueError(f"{name!r} is no interface")
    for entry in lease.get("paths", []) + lease.get("locks", []):
        if not isinstance(entry, str) or not os.path.isabs(entry):
            raise ValueError(f"{entry!r} is no absolute path")
    return lease  # type: ignore[no-any-return]


def remove_tap(name: str, netns: str | None) -> list[str]:
    """Remove a persistent TAP, in a named network namespace if one is given; returns failures in words."""
    if netns is None:
        if not os.path.exists(f"/sys/class/net/{name}"):
            return []
        return _run_ip(None, "tuntap", "del", "dev", name, "mode", "tap", absent="No such device")
    if not os.path.exists(f"/run/netns/{netns}"):
        return []
    return _run_ip(netns, "link", "del", "dev", name, absent="Cannot find device")


def _run_ip(netns: str | None, *arguments: str, absent: str) -> list[str]:
    import subprocess

    command = ["ip", *(("-n", netns) if netns else ()), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"{' '.join(command)}: {error}"]
    if done.returncode == 0 or absent in done.stderr:
        return []
    return [f"{' '.join(command)}: {done.stderr.strip()}"]


def remove_free_lock(path: str) -> list[str]:
    """Remove a lock file that nobody holds, and its directory if that leaves it empty; returns failures in words."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"{path}: {error}"]
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
        os.rmdir(os.path.dirname(path))
    except OSError:
        # Somebody holds it now, or another lock is beside it: theirs to remove.
        return []
    finally:
        os.close(fd)
    return []


def remove_tree(path: str | os.PathLike[str]) -> list[str]:
    """Remove a file or directory tree; returns failures in words. One that is not there is no failure."""
    place = os.fspath(path)
    try:
        if not os.path.isdir(place) or os.path.islink(place):
            os.unlink(place)
            return []
        failures = [failure for entry in os.listdir(place) for failure in remove_tree(os.path.join(place, entry))]
        if not failures:
            os.rmdir(place)
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"{place}: {error.strerror}"]
    return failures


def remove_abandoned(runtime_dir: str | os.PathLike[str], *, dry_run: bool = False) -> tuple[list[str], list[str]]:
    """Remove what runs left whose keeper and owner are both gone; returns what was removed and what could not be, in words.

    A directory whose lock is held, or whose owner lives, is somebody's and is left alone.
    """
    removed: list[str] = []
    failures: list[str] = []
    try:
        names = os.listdir(runtime_dir)
    except FileNotFoundError:
        return removed, failures
    for name in sorted(names):
        directory = os.path.join(os.fspath(runtime_dir), name)
        try:
            if not os.path.isdir(directory) or not _is_abandoned(directory):
                continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            failures.append(f"{directory} is not understood ({type(error).__name__}: {error}): left as it is")
            continue
        removed.append(directory)
        if not dry_run:
            for entry in sorted(os.listdir(directory)):
                lease = os.path.join(directory, entry)
                if os.path.isdir(lease):
                    failures += remove_lease(lease)
            failures += remove_tree(directory)
    return removed, failures


def _is_abandoned(directory: str) -> bool:
    import json

    owner = json.loads(_read(os.path.join(directory, "owner.json")))
    if owner["boot_id"] == boot_id() and start_time_ticks(int(owner["pid"])) == owner["start_time_ticks"]:
        return False
    try:
        fd = os.open(os.path.join(directory, "lock"), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        # Its owner died before its keeper was there.
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True

"""What a VM leaves on the host, and how to remove it, for those who outlive it.

Standard library only, and imports nothing of this package: the keeper, which must start in milliseconds
and stay small, runs it as well as the process that owns the VM.

Each VM has a *lease*: a directory of its own below the directory of the process that owns it, with a file
`lease.json` that names what lives elsewhere. It is written before anything of that is made:

    {"taps": [{"name": ..., "netns": ...}], "bridges": [...], "paths": [...], "locks": [...]}
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

LEASE_FILE = "lease.json"
COMMAND_TIMEOUT_S = 2.0


def boot_id() -> str:
    """Return the host's boot id (random(4)): pids and start times mean something within one boot only."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_time_ticks(pid: int) -> int | None:
    """Return field 22 of `/proc/PID/stat` (proc(5)); None where there is no such process, or only a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name, field 2, is in parentheses and may contain spaces and parentheses itself.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def command_line(pid: int) -> tuple[str, ...]:
    """Return a process's arguments; empty where it is gone."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return ()
    return tuple(os.fsdecode(word) for word in raw.rstrip(b"\0").split(b"\0"))


def processes_naming(directory: Path) -> list[int]:
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
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0, timeout_s * 1000)))


def remove_lease(directory: Path) -> list[str]:
    """End and remove all that a lease names, and its directory; returns what could not be removed, in words.

    Each step is tried whatever became of those before it. What is already gone is no failure.
    """
    failures = [f"process {pid} outlived SIGKILL" for pid in kill_and_wait(processes_naming(directory), COMMAND_TIMEOUT_S)]
    try:
        lease = json.loads((directory / LEASE_FILE).read_bytes())
        if not isinstance(lease, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        lease = {}
    except (OSError, ValueError) as error:
        failures.append(f"{directory / LEASE_FILE} cannot be read ({error}): what it named is left")
        lease = {}
    for tap in lease.get("taps", ()):
        failures += remove_tap(tap["name"], tap.get("netns"))
    for bridge in lease.get("bridges", ()):
        failures += _run_ip(None, "link", "del", "dev", bridge, absent="Cannot find device")
    for path in lease.get("paths", ()):
        failures += remove_tree(Path(path))
    for lock in lease.get("locks", ()):
        failures += remove_free_lock(Path(lock))
    return failures + remove_tree(directory)


def remove_tap(name: str, netns: str | None) -> list[str]:
    """Remove a persistent TAP, in a named network namespace if one is given; returns failures in words."""
    root = Path("/sys/class/net")
    if netns is None and not (root / name).exists():
        return []
    if netns is not None and not Path("/run/netns", netns).exists():
        return []
    if netns is None:
        return _run_ip(None, "tuntap", "del", "dev", name, "mode", "tap", absent="No such device")
    return _run_ip(netns, "link", "del", "dev", name, absent="Cannot find device")


def _run_ip(netns: str | None, *arguments: str, absent: str) -> list[str]:
    command = ["ip", *(("-n", netns) if netns else ()), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"{' '.join(command)}: {error}"]
    if done.returncode == 0 or absent in done.stderr:
        return []
    return [f"{' '.join(command)}: {done.stderr.strip()}"]


def remove_free_lock(path: Path) -> list[str]:
    """Remove a lock file that nobody holds, and its directory if that leaves it empty; returns failures in words."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"{path}: {error}"]
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        path.parent.rmdir()
    except OSError:
        # Somebody holds it now, or another lock is beside it: theirs to remove.
        return []
    finally:
        os.close(fd)
    return []


def remove_tree(path: Path) -> list[str]:
    """Remove a file or directory tree; returns failures in words. One that is not there is no failure."""
    failures: list[str] = []

    def failed(_function: object, where: str, error: tuple[type[BaseException], BaseException, object]) -> None:
        if not isinstance(error[1], FileNotFoundError):
            failures.append(f"{where}: {error[1]}")

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onerror=failed)
    else:
        try:
            path.unlink()
        except FileNotFoundError:
            return []
        except OSError as error:
            failures.append(f"{path}: {error}")
    return failures

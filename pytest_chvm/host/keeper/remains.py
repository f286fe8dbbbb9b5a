"""Identities of processes that no reused pid confuses, and the removal of what a VM leaves behind.

Standard library only, as little of it as possible, and nothing of this package: the keeper, which must start in
milliseconds and stay small, runs it as well as the process that owns the VM.
"""

from __future__ import annotations

# The module `signal` imports `enum`, which costs the keeper a third of its start.
import _signal as signal  # type: ignore[import-not-found]
import _socket
import os
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

COMMAND_TIMEOUT_S = 1.0
# The longest time that a stop of the machine may take of a wait.
LONGEST_WAIT_S = 0.5


def boot_id() -> str:
    """Return the host's boot id (random(4)): pids and start times mean something within one boot only."""
    return _read("/proc/sys/kernel/random/boot_id").decode().strip()


def start_time_ticks(pid: int) -> int | None:
    """Return field 22 of `/proc/PID/stat` (proc(5)); None where there is no such process, or only a zombie."""
    fields = _stat(pid)
    return None if fields is None else int(fields[19])


def session_id(pid: int) -> int | None:
    """Return the session of a process; None where there is no such process, or only a zombie."""
    fields = _stat(pid)
    return None if fields is None else int(fields[3])


def _stat(pid: int) -> list[bytes] | None:
    """Return the fields of `/proc/PID/stat` from the third on; None where there is no such process, or only a zombie."""
    try:
        stat = _read(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name, field 2, is in parentheses and may contain spaces and parentheses itself.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else fields


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


def interface_is_there(name: str, netns: str | None) -> bool:
    """Tell whether a network interface is there, as far as this process can see it."""
    if netns is None:
        # Not by /sys/class/net, which has the links of the namespace that it was mounted in.
        try:
            return bool(_socket.if_nametoindex(name))
        except OSError:
            return False
    return os.path.exists(f"/run/netns/{netns}") and not _run_ip(netns, "link", "show", "dev", name, absent="")


def processes_of_sessions(leaders: dict[int, int], directory: str) -> dict[int, int]:
    """Return pid and start time of the processes of sessions, given by pid and start time of their leaders.

    Where the leader is gone its pid may have been reused: then only processes that name a path below `directory` count.
    """
    needle = directory + "/"
    found = {}
    for pid in [int(entry) for entry in os.listdir("/proc") if entry.isdigit()] if leaders else ():
        try:
            leader, started = session_id(pid), start_time_ticks(pid)
            if leader not in leaders or started is None:
                continue
            leader_started = start_time_ticks(leader)
            if leader_started == leaders[leader] or (leader_started is None and any(needle in word for word in command_line(pid))):
                found[pid] = started
        except OSError:
            continue
    return found


def kill_and_wait(processes: dict[int, int], timeout_s: float) -> list[int]:
    """SIGKILL processes, given by pid and start time, and wait for their end; returns the pids still there at the deadline."""
    descriptors: dict[int, int] = {}
    for pid, started in processes.items():
        try:
            descriptors[pid] = os.pidfd_open(pid)
            # Looked at once the descriptor is open: what that refers to cannot change any more.
            if start_time_ticks(pid) != started:
                os.close(descriptors.pop(pid))
                continue
            signal.pidfd_send_signal(descriptors[pid], signal.SIGKILL)
        except OSError:
            # Gone, or not ours to signal: then it is reported as still there.
            continue
    there = wait_for_ends(descriptors.values(), timeout_s)
    for fd in descriptors.values():
        os.close(fd)
    return [pid for pid, fd in descriptors.items() if fd in there]


def pidfd_ended(pidfd: int, timeout_s: float) -> bool:
    """Wait for a process to end (a zombie has ended); tells whether it did within the time."""
    return not wait_for_ends([pidfd], timeout_s)


def wait_for_ends(pidfds: Iterable[int], timeout_s: float) -> set[int]:
    """Wait for processes to end; returns the descriptors of those still there when the time is over.

    Time in which this process was stopped does not count: the others were stopped too.
    """
    poll = select.poll()
    there = set(pidfds)
    for pidfd in there:
        poll.register(pidfd, select.POLLIN)
    while there:
        wait_s = max(0.0, min(timeout_s, LONGEST_WAIT_S))
        started_s = time.clock_gettime(time.CLOCK_MONOTONIC)
        ended = [pidfd for pidfd, _events in poll.poll(wait_s * 1000)]
        timeout_s -= min(wait_s, time.clock_gettime(time.CLOCK_MONOTONIC) - started_s)
        for pidfd in ended:
            poll.unregister(pidfd)
            there.discard(pidfd)
        if not ended and timeout_s <= 0:
            break
    return there


def remove_tap(name: str, netns: str | None) -> list[str]:
    """Remove a persistent TAP, in a named network namespace if one is given; returns failures in words."""
    if netns is None:
        if not interface_is_there(name, None):
            return []
        return _run_ip(None, "tuntap", "del", "dev", name, "mode", "tap", absent="No such device")
    if not os.path.exists(f"/run/netns/{netns}"):
        return []
    return _run_ip(netns, "link", "del", "dev", name, absent="Cannot find device")


def remove_bridge(name: str) -> list[str]:
    """Remove a bridge; returns failures in words."""
    return _run_ip(None, "link", "del", "dev", name, absent="Cannot find device") if interface_is_there(name, None) else []


def _run_ip(netns: str | None, *arguments: str, absent: str) -> list[str]:
    import subprocess

    command = ["ip", *(("-n", netns) if netns else ()), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"{' '.join(command)}: {error}"]
    if done.returncode == 0 or (absent and absent in done.stderr):
        return []
    return [f"{' '.join(command)}: {done.stderr.strip()}"]

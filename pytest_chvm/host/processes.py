"""Processes of the host: who one is, and ending one that is surely it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress

from pytest_chvm.base.pidfds import open_pidfd
from pytest_chvm.errors import HostError, StateFailedError
from pytest_chvm.host.host import keeper_of
from pytest_chvm.host.keeper import remains
from pytest_chvm.model import ProcessIdentity


def identity_of(pid: int) -> ProcessIdentity:
    """Return the identity of a process, with no start time where it has ended."""
    return ProcessIdentity(pid, remains.start_time_ticks(pid))


def is_running(process: ProcessIdentity, programs: Sequence[str]) -> bool:
    """Tell whether this very process is alive; a zombie is not.

    Raises StateFailedError where another process has its pid, told by the start time and by the command line,
    which must name one of `programs` (`ip netns exec` before it counts as the program it will become).
    """
    started = remains.start_time_ticks(process.pid)
    if started is None:
        return False
    if process.start_time_ticks not in (None, started):
        raise StateFailedError(
            f"pid {process.pid} is another process now: it started at tick {started}, the VM's at "
            f"{process.start_time_ticks}; it was not signalled"
        )
    words = remains.command_line(process.pid)
    # On its way out it has no command line any more, and is not a zombie yet; its start time says that it is the one.
    if not any(words) and process.start_time_ticks == started:
        return True
    if not any(program in os.path.basename(word) for word in words for program in programs):
        # It may have ended between the two looks at it.
        if remains.start_time_ticks(process.pid) != started:
            return False
        raise StateFailedError(
            f"pid {process.pid} runs {' '.join(words)[:120]!r}, expected {' or '.join(programs)}; it was not signalled"
        )
    return True


def end_process(process: ProcessIdentity, programs: Sequence[str], *, term_timeout_s: float, kill_timeout_s: float) -> bool:
    """End a process: SIGTERM and `term_timeout_s` of patience (0: none), then SIGKILL. True if SIGKILL was needed.

    Raises StateFailedError where it is another process, TimeoutError where it outlives SIGKILL. One that is gone
    already is no error. One that a keeper of this process's started is also collected by it: not even a zombie is left.
    """
    try:
        pidfd = open_pidfd(process.pid)
    except ProcessLookupError:
        return False
    killed = _end_checked(process, pidfd, programs, term_timeout_s=term_timeout_s, kill_timeout_s=kill_timeout_s)
    _see_collected(process)
    return killed


def _end_checked(
    process: ProcessIdentity, pidfd: int, programs: Sequence[str], *, term_timeout_s: float, kill_timeout_s: float
) -> bool:
    try:
        # Checked while the pidfd is open: what it refers to cannot change any more.
        if not is_running(process, programs):
            # Its first thread is a zombie before the others have ended.
            remains.pidfd_ended(pidfd, kill_timeout_s)
            return False
        if term_timeout_s > 0:
            _signal(pidfd, signal.SIGTERM)
            if remains.pidfd_ended(pidfd, term_timeout_s):
                return False
        _signal(pidfd, signal.SIGKILL)
        if not remains.pidfd_ended(pidfd, kill_timeout_s):
            raise TimeoutError(f"pid {process.pid} is still there {kill_timeout_s:g} s after SIGKILL")
        return True
    finally:
        os.close(pidfd)


def _see_collected(process: ProcessIdentity) -> None:
    """Block until the keeper that started an ended process has collected it; another process's keeper is not ours to ask."""
    if (keeper := keeper_of(process)) is not None:
        # A keeper that was killed has left them to one that collects them.
        with suppress(HostError):
            keeper.returncode(process)


def end_all(
    processes: Sequence[ProcessIdentity], programs: Sequence[str], *, term_timeout_s: float, kill_timeout_s: float
) -> list[str]:
    """End processes as `end_process` does, all at once; returns what went wrong, in words."""
    failures = []

    def end(process: ProcessIdentity) -> None:
        try:
            end_process(process, programs, term_timeout_s=term_timeout_s, kill_timeout_s=kill_timeout_s)
        except (StateFailedError, TimeoutError, OSError) as error:
            failures.append(str(error))

    threads = [threading.Thread(target=end, args=(process,), daemon=True) for process in processes[1:]]
    for thread in threads:
        thread.start()
    for process in processes[:1]:
        end(process)
    for thread in threads:
        thread.join()
    return failures


def _signal(pidfd: int, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        # Ended between the check and now, which is what was wanted.
        return

"""Processes of the host: who one is, starting one below the keeper, ending one that is surely it."""

from __future__ import annotations

import atexit
import logging
import marshal
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_chvm.deadline import Deadline, wait_readable
from pytest_chvm.errors import BootFailedError, StateFailedError, VmIOError
from pytest_chvm.host import keeper as keeper_script
from pytest_chvm.host import remains
from pytest_chvm.host.directories import make_owner_dir, runtime_dir
from pytest_chvm.model import ProcessIdentity

logger = logging.getLogger("pytest_chvm")

# Long, for an emulated machine on a busy host.
KEEPER_START_TIMEOUT_S = 30.0
KEEPER_END_TIMEOUT_S = 4.0
KILLED_TIMEOUT_S = 2.0
# All of the test's environment that a VMM or sidecar gets to see.
PASSED_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL")


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
    already is no error.
    """
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        # Checked while the pidfd is open: what it refers to cannot change any more.
        if not is_running(process, programs):
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


def _signal(pidfd: int, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        # Ended between the check and now, which is what was wanted.
        return


class Keeper:
    """This process's keeper: the parent of all VMMs and sidecars, that cleans up should this process die.

    `directory` is where the leases of this process's VMs are.
    """

    def __init__(self) -> None:
        self.owner_pid = os.getpid()
        # Before anything is started: what a run left that was killed together with its keeper.
        _removed, failures = remains.remove_abandoned(runtime_dir())
        for failure in failures:
            logger.warning("left by an earlier run: %s", failure)
        self.directory = make_owner_dir()
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        script = os.path.abspath(keeper_script.__file__)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", script, str(self.owner_pid), str(self.directory), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                cwd="/",
            )
        self._receive(KEEPER_START_TIMEOUT_S, "start")

    def _receive(self, timeout_s: float, what: str) -> dict[str, object]:
        if not wait_readable([self._socket.fileno()], Deadline.after(timeout_s)):
            raise VmIOError(f"the keeper process (pid {self._process.pid}) did not answer {what!r} within {timeout_s:g} s")
        packet = self._socket.recv(keeper_script.LARGEST_REQUEST)
        if not packet:
            raise VmIOError(
                f"the keeper process (pid {self._process.pid}) is gone: something killed it, and with it its VMs; "
                "start the run again"
            )
        reply: dict[str, object] = marshal.loads(packet)  # noqa: S302 - from our own keeper
        return reply

    def _ask(self, request: Mapping[str, object], fds: Sequence[int] = ()) -> dict[str, object]:
        with self._lock:
            try:
                socket.send_fds(self._socket, [marshal.dumps(dict(request))], list(fds))
            except BrokenPipeError as error:
                raise VmIOError(f"the keeper process (pid {self._process.pid}) is gone: start the run again") from error
            return self._receive(KEEPER_START_TIMEOUT_S, next(iter(request)))

    def spawn(self, argv: Sequence[str], log: Path, fds: Sequence[int] = ()) -> ProcessIdentity:
        """Start a program below the keeper, its outputs appended to `log`.

        `{fd0}` in an argument becomes the number that `fds[0]` has in the program. It gets no other descriptor
        and next to nothing of the environment. Raises BootFailedError where it cannot be started.
        """
        environment = {key: os.environ[key] for key in PASSED_ENVIRONMENT if key in os.environ}
        reply = self._ask({"spawn": list(argv), "environment": environment, "log": os.fspath(log)}, fds)
        pid, ticks = reply.get("pid"), reply.get("start_time_ticks")
        if not isinstance(pid, int):
            raise BootFailedError(f"{argv[0]} could not be started: {reply.get('error')} (its log was to be {log})")
        return ProcessIdentity(pid, ticks if isinstance(ticks, int) else None)

    def returncode(self, process: ProcessIdentity) -> int | None:
        """Return how a program of this keeper's ended: its status, or minus the signal; None while it runs."""
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            # Reaped already: the keeper knows.
            pass
        else:
            with os.fdopen(pidfd):
                # A zombie whose threads are still ending has no status yet.
                if remains.start_time_ticks(process.pid) is None:
                    remains.pidfd_ended(pidfd, KILLED_TIMEOUT_S)
        code = self._ask({"status": process.pid}).get("returncode")
        return code if isinstance(code, int) else None

    def close(self) -> None:
        """Let the keeper remove what is left and wait for its end."""
        self._socket.close()
        if self.owner_pid != os.getpid():
            return
        try:
            self._process.wait(KEEPER_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # It goes on by itself; waiting longer would only hold up the end of the run.
            sys.stderr.write(f"pytest-chvm: the keeper (pid {self._process.pid}) is still cleaning up\n")


_keeper: Keeper | None = None
_keeper_lock = threading.Lock()


def keeper() -> Keeper:
    """Return this process's keeper, started at the first call; a forked child gets one of its own."""
    global _keeper
    with _keeper_lock:
        if _keeper is None or _keeper.owner_pid != os.getpid():
            _keeper = Keeper()
            atexit.register(close_keeper)
        return _keeper


def close_keeper() -> None:
    """End this process's keeper, if it has one, and wait for it."""
    global _keeper
    with _keeper_lock:
        mine, _keeper = _keeper, None
    if mine is not None:
        mine.close()

"""Processes of the host: who one is, starting one below the keeper, ending one that is surely it."""

from __future__ import annotations

import atexit
import itertools
import logging
import marshal
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pytest_chvm.base.deadline import Deadline, wait_readable
from pytest_chvm.base.untouched import socket_pair
from pytest_chvm.errors import BootFailedError, HostError, StateFailedError
from pytest_chvm.host.directories import make_owner_dir, runtime_dirs
from pytest_chvm.host.keeper import keeper as keeper_script
from pytest_chvm.host.keeper import logbound, records, remains
from pytest_chvm.host.runs import Level, current_level
from pytest_chvm.model import ProcessIdentity

logger = logging.getLogger("pytest_chvm")

# Long, for an emulated machine on a busy host.
KEEPER_START_TIMEOUT_S = 30.0
KEEPER_ANSWER_TIMEOUT_S = 30.0
KEEPER_END_TIMEOUT_S = 2.5
KILLED_TIMEOUT_S = 2.0
# How long a log may be, and what is kept of the beginning and of the end of one that was longer.
LOG_BOUND = (logbound.LIMIT, logbound.HEAD, logbound.TAIL)
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
    already is no error. One that this process's keeper started is also collected by it: not even a zombie is left.
    """
    try:
        pidfd = os.pidfd_open(process.pid)
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
    for one in [one for one in _keepers if one.pid == _keeper_of.get(process.pid)]:
        # A keeper that was killed has left them to one that collects them.
        with suppress(HostError):
            one.returncode(process)


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


class Keeper:
    """This process's keeper: the parent of all VMMs and sidecars, that cleans up should this process die.

    `directory` is where the leases of this process's VMs are, of those of one run.
    """

    def __init__(self, level: Level) -> None:
        self.level = level
        run = level.run
        self.owner_pid = os.getpid()
        # Before anything is started: what a run left that was killed together with its keeper.
        for place in runtime_dirs():
            for failure in records.remove_abandoned(place)[1]:
                logger.warning("left by an earlier run: %s", failure)
        self.pid = 0
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        owners = [identity_of(self.owner_pid), *([run.controller] if run.controller else [])]
        # The directory last of what may fail: from here on whatever fails removes it.
        self._socket, theirs = socket_pair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.directory = make_owner_dir(run)
        except BaseException:
            self._socket.close()
            theirs.close()
            raise
        words = [",".join(f"{owner.pid}:{owner.start_time_ticks}" for owner in owners), str(self.directory), str(theirs.fileno())]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", keeper_script.START, os.path.abspath(keeper_script.__file__), *words],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                    cwd="/",
                )
            self.pid = self._process.pid
            if error := self._receive(0, Deadline.after(KEEPER_START_TIMEOUT_S), "start").get("error"):
                raise HostError(f"the keeper process cannot start in {str(self.directory)!r}: {error}")
        except BaseException:
            if self.pid:
                self.close()
            else:
                self._socket.close()
                self._remove_directory()
            raise

    @property
    def is_alive(self) -> bool:
        """Whether it can still be asked; what one had that was killed is gone by the time it cannot."""
        return self._process.poll() is None and not self._at_end()

    @property
    def has_directory(self) -> bool:
        """Whether nobody has removed its directory."""
        return (self.directory / records.OWNER_FILE).exists()

    def _at_end(self) -> bool:
        try:
            return not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _receive(self, number: int, deadline: Deadline, what: str) -> dict[str, object]:
        while True:
            if not wait_readable([self._socket.fileno()], deadline):
                raise HostError(f"the keeper process (pid {self.pid}) did not answer {what!r} within {deadline.total_s:g} s")
            try:
                packet = self._socket.recv(keeper_script.LARGEST_REQUEST)
            except ConnectionError:
                packet = b""
            if not packet:
                raise HostError(_gone(self.pid))
            reply: dict[str, object] = marshal.loads(packet)  # noqa: S302 - from our own keeper
            # A test that is interrupted does not wait for the answer; the next one finds it.
            if reply.get("id") == number:
                return reply

    def _ask(
        self, request: Mapping[str, object], fds: Sequence[int] = (), timeout_s: float = KEEPER_ANSWER_TIMEOUT_S
    ) -> dict[str, object]:
        deadline = Deadline.after(timeout_s)
        with self._lock:
            if self._socket.fileno() < 0:
                raise HostError(_gone(self.pid))
            number = next(self._numbers)
            try:
                socket.send_fds(self._socket, [marshal.dumps({**request, "id": number})], list(fds))
            except ConnectionError as error:
                raise HostError(_gone(self.pid)) from error
            return self._receive(number, deadline, next(iter(request)))

    def spawn(
        self,
        argv: Sequence[str],
        log: Path,
        lease: Path,
        fds: Sequence[int] = (),
        *,
        output: Path | None = None,
        other_logs: Sequence[Path] = (),
    ) -> ProcessIdentity:
        """Start a program below the keeper; it is written down in `lease`, the directory of one.

        What it says is appended to `log`, of its standard output to `output` where that is given. These, and `other_logs` that it
        writes itself, are kept from filling the disk: see logbound.py.

        `{fd0}` in an argument becomes the number that `fds[0]` has in the program. It gets no other descriptor
        and next to nothing of the environment. Raises BootFailedError where it cannot be started.
        """
        environment = {key: os.environ[key] for key in PASSED_ENVIRONMENT if key in os.environ}
        request: dict[str, object] = {"spawn": list(argv), "environment": environment, "lease": os.fspath(lease)}
        request |= {"log": os.fspath(log), "output": os.fspath(output or log)}
        logs = {os.fspath(path) for path in (log, output or log, *other_logs)}
        request |= {"logs": sorted(logs), "bound": LOG_BOUND}
        reply = self._ask(request, fds)
        pid, ticks = reply.get("pid"), reply.get("start_time_ticks")
        if not isinstance(pid, int):
            raise BootFailedError(f"{argv[0]} could not be started: {reply.get('error')} (its log was to be {log})")
        _keeper_of[pid] = self.pid
        return ProcessIdentity(pid, ticks if isinstance(ticks, int) else None)

    def remember(self, lease: Path, record: Mapping[str, object] | None) -> None:
        """Have the keeper know what a lease names, in case somebody removes its file; None: it was released."""
        try:
            self._ask({"remember": os.fspath(lease), "record": None if record is None else dict(record)})
        except HostError:
            # It was killed: what names the lease now is the file alone, and it removes that.
            if record is not None:
                raise

    def returncode(self, process: ProcessIdentity) -> int | None:
        """Return how a program of this keeper's ended: its status, or minus the signal; None while it runs."""
        if _keeper_of.get(process.pid) != self.pid:
            raise HostError(_gone(_keeper_of.get(process.pid, 0)))
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

    def close(self) -> list[str]:
        """End and remove all that is left and wait for the keeper's end; returns what could not be removed, in words."""
        deadline = Deadline.after(KEEPER_END_TIMEOUT_S)
        failures: list[str] = []
        try:
            failures += self._end("processes", deadline)
            for give_back in before_leases_end:
                give_back(self.directory)
            failures += self._end("leases", deadline)
        except HostError as error:
            if self.is_alive:
                failures.append(str(error))
        finally:
            # Whoever has forked from this process may have the socket open too.
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
            hung = not self._wait_end(deadline)
            self._socket.close()
        if hung:
            failures.append(f"the keeper (pid {self.pid}) was still there after {deadline.total_s:g} s and was killed")
            pids = records.read_pairs(os.fspath(self.directory / records.LOCK_FILE))
            remains.kill_and_wait(pids, KILLED_TIMEOUT_S)
        return failures + self._remove_directory()

    def _remove_directory(self) -> list[str]:
        failures = records.remove_owner_directory(os.fspath(self.directory)) if self.directory.exists() else []
        keeper_script.remove_run_directory(os.fspath(self.directory))
        return failures

    def _end(self, what: str, deadline: Deadline) -> list[str]:
        failures = self._ask({"end": what}, timeout_s=deadline.remaining_s).get("failures")
        return [str(failure) for failure in failures] if isinstance(failures, list) else []

    def _wait_end(self, deadline: Deadline) -> bool:
        while not self._at_end():
            if not wait_readable([self._socket.fileno()], deadline):
                return False
            self._socket.recv(keeper_script.LARGEST_REQUEST)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(KILLED_TIMEOUT_S)
        return True

    def forget(self) -> None:
        """Let go of it, in a forked child: it is the parent's."""
        self._socket.close()
        # Not this process's to wait for.
        self._process.returncode = 0


def _gone(pid: int) -> str:
    return f"the keeper process (pid {pid}) is gone: it was killed, and its VMs were ended; the next VM gets a new one"


# Of each program started, the pid of the keeper that did.
_keeper_of: dict[int, int] = {}
# What is to happen between the end of the processes and the removal of the records, in a keeper's directory.
before_leases_end: list[Callable[[Path], None]] = []
_keepers: list[Keeper] = []
_keeper_lock = threading.Lock()


def keeper() -> Keeper:
    """Return the current run's keeper, started at the first call; after one that was killed, or lost its directory, another."""
    with _keeper_lock:
        level = current_level()
        last = next((one for one in reversed(_keepers) if one.level is level), None)
        if last is None or not last.is_alive or not last.has_directory:
            if not _keepers:
                atexit.register(close_keeper)
            _close(gone=True)
            last = Keeper(level)
            _keepers.append(last)
        return last


def close_keeper(level: Level | None = None) -> list[str]:
    """End this process's keepers, or those of one run, and wait for them; returns what could not be removed, in words."""
    with _keeper_lock:
        return _close(level)


def _close(level: Level | None = None, *, gone: bool = False) -> list[str]:
    failures = []
    for one in [one for one in _keepers if not (gone and one.is_alive) and (level is None or one.level is level)]:
        failed = one.close()
        # What this process itself has open still cannot be removed yet: the rest goes at the end of the process. Nor is one
        # forgotten before: an interrupted close is begun again then.
        if not (gone and failed):
            _keepers.remove(one)
        failures += failed
    return failures


def _forget() -> None:
    global _keeper_lock
    _keeper_lock = threading.Lock()
    while _keepers:
        _keepers.pop().forget()


os.register_at_fork(after_in_child=_forget)

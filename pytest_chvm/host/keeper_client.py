"""A keeper, as seen by the process that it keeps: starting it, asking it, ending it."""

from __future__ import annotations

import itertools
import logging
import marshal
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pytest_chvm.base.deadline import Deadline, wait_readable
from pytest_chvm.base.pidfds import open_pidfd
from pytest_chvm.base.untouched import socket_pair
from pytest_chvm.errors import BootFailedError, HostError
from pytest_chvm.host.directories import make_owner_dir, runtime_dirs
from pytest_chvm.host.keeper import keeper as keeper_script
from pytest_chvm.host.keeper import logbound, records, remains
from pytest_chvm.host.runs import Run
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


class Keeper:
    """A keeper of this process's: the parent of a run's VMMs and sidecars, that cleans up should this process die.

    `directory` is where the leases of the run's VMs are. It starts while its owner goes on, until the first question, which raises
    HostError where it could not start.
    """

    def __init__(self, run: Run) -> None:
        # Before anything is started: what a run left that was killed together with its keeper.
        for place in runtime_dirs():
            for failure in records.remove_abandoned(place)[1]:
                logger.warning("left by an earlier run: %s", failure)
        self.pid = 0
        # Of the programs it has started, by their pids.
        self._started: dict[int, ProcessIdentity] = {}
        self._numbers = itertools.count(1)
        self._is_starting = True
        self._lock = threading.Lock()
        me = os.getpid()
        owners = [ProcessIdentity(me, remains.start_time_ticks(me))]
        owners += [run.controller] if run.controller else []
        # The directory last of what may fail: from here on whatever fails removes it.
        self._socket, theirs = socket_pair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.directory = make_owner_dir(run)
        except BaseException:
            self._socket.close()
            theirs.close()
            raise
        self._start_deadline = Deadline.after(KEEPER_START_TIMEOUT_S)
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
        except BaseException:
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

    def _wait_started(self) -> None:
        if error := self._receive(0, self._start_deadline, "start").get("error"):
            raise HostError(f"the keeper process cannot start in {str(self.directory)!r}: {error}")
        self._is_starting = False

    def _ask(
        self, request: Mapping[str, object], fds: Sequence[int] = (), timeout_s: float = KEEPER_ANSWER_TIMEOUT_S
    ) -> dict[str, object]:
        deadline = Deadline.after(timeout_s)
        with self._lock:
            if self._socket.fileno() < 0:
                raise HostError(_gone(self.pid))
            if self._is_starting:
                self._wait_started()
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
        process = self._started[pid] = ProcessIdentity(pid, ticks if isinstance(ticks, int) else None)
        return process

    def has_started(self, process: ProcessIdentity) -> bool:
        """Tell whether a process is a program that this keeper has started."""
        return self._started.get(process.pid) == process

    def remember(self, lease: Path, record: Mapping[str, object] | None) -> None:
        """Have the keeper know what a lease names, in case somebody removes its file; None: it was released."""
        try:
            self._ask({"remember": os.fspath(lease), "record": None if record is None else dict(record)})
        except HostError:
            # It was killed: what names the lease now is the file alone, and it removes that.
            if record is not None:
                raise

    def returncode(self, process: ProcessIdentity) -> int | None:
        """Return how a program that this keeper has started ended: its status, or minus the signal; None while it runs."""
        try:
            pidfd = open_pidfd(process.pid)
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

    def close(self, between: Callable[[], None] = lambda: None) -> list[str]:
        """End and remove all that is left and wait for the keeper's end; returns what could not be removed, in words.

        `between`: what is to happen between the end of the processes and the removal of the leases.
        """
        deadline = Deadline.after(KEEPER_END_TIMEOUT_S)
        failures: list[str] = []
        try:
            failures += self._end("processes", deadline)
            between()
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

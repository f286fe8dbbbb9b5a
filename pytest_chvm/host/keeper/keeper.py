"""The keeper: two small processes that are the parents of every VMM and sidecar, and outlive their owner.

Started by `START`, with `keeper.py OWNERS DIRECTORY CONTROL_FD` (OWNERS: `PID:START_TIME_TICKS`, separated by commas), in a
session of its own. It ignores the signals of a terminal and waits for the end of its socket to the first owner *and* for the
pidfds of all owners (a forked child can hold the socket open; the second owner is pytest-xdist's controller). Then it kills its
children and removes what the leases in its directory name.

The first process forks the second, which does all that, and waits for its end. Should the second be killed, the kernel kills the
children it started (PR_SET_PDEATHSIG), those of the children become the first one's (PR_SET_CHILD_SUBREAPER), and that removes
everything. Should the first be killed, the second does. Both hold the lock on DIRECTORY/lock: whoever finds it free, and
the owner gone, may remove the rest.

Standard library only, and of that what is small: it starts once per worker, within milliseconds. Requests are one marshalled
dict per packet (importing json would take a third of the start-up), with file descriptors beside it; each has an "id" and
gets one marshalled dict back that has it too:

    {"spawn": [ARGV...], "environment": {...}, "output": PATH, "log": PATH, "lease": PATH, "logs": [PATH...], "bound": (N, N, N)}
                                                              -> {"pid": N, "start_time_ticks": N}
        "{fd0}", "{fd1}" in an argument become the numbers of the descriptors sent along; "logs" grow at most as "bound" says,
        see logbound.py
    {"status": PID}                                           -> {"returncode": N or None}
    {"remember": PATH, "record": {...} or None}               -> {}
        what a lease names, in case somebody removes the file; None: it was released
    {"end": "processes"}                                      -> {"failures": [TEXT...]}
    {"end": "leases"}                                         -> {"failures": [TEXT...]}
    (none, with "id" 0)                                       -> {} once it is there, or {"error": TEXT}
    any that failed                                           -> {"error": TEXT}
"""

from __future__ import annotations

# The modules `signal` and `socket` import `enum`, `selectors` and more, which doubles the start-up.
import _signal as signal  # type: ignore[import-not-found]
import _socket as socket
import ctypes
import errno
import marshal
import os
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

if __name__ == "keeper":
    # Isolated (-I -S), without its package: see START.
    import lockfiles  # type: ignore[import-not-found]
    import logbound  # type: ignore[import-not-found]
    import records  # type: ignore[import-not-found]
    import remains  # type: ignore[import-not-found]
else:
    from pytest_chvm.base import lockfiles
    from pytest_chvm.host.keeper import logbound, records, remains

# For python -c: a module is compiled once and a script each time, which takes as long as all the rest. Beside the keeper are its
# siblings, and in `base` what the rest of the package has from the same modules.
START = (
    "import sys; here = sys.argv[1].rpartition('/')[0]; sys.path.insert(0, here); sys.path.append(f'{here}/../../base'); "
    "import keeper; sys.exit(keeper.main(sys.argv[2:]))"
)
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LARGEST_REQUEST = 1 << 20
MOST_FDS = 16
END_S = 1.5
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)

_libc = ctypes.CDLL(None, use_errno=True)


class Keeper:
    """The children, and what became of those that ended."""

    def __init__(self, control: socket.socket, directory: str) -> None:
        self.control = control
        self.directory = directory
        self.returncodes: dict[int, int] = {}
        self.spawned: set[int] = set()
        self.leases: dict[str, dict[str, Any]] = {}
        self.logs = logbound.BoundedLogs()

    def serve(self, ends: list[int], child_ended: int) -> None:
        """Answer requests until the owner has closed its end, or one of the pidfds `ends` is readable."""
        poll = select.poll()
        for fd in (self.control.fileno(), child_ended, *ends):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _events in poll.poll(self.logs.wait_ms())}
            self.logs.check()
            if child_ended in ready:
                os.read(child_ended, 4096)
                self.reap()
            if self.control.fileno() in ready and not self.answer():
                return
            if ready.intersection(ends):
                return

    def reap(self) -> None:
        """Collect every child that has ended, and know how."""
        for pid, status in collect():
            if pid in self.spawned:
                self.spawned.discard(pid)
                self.logs.forget(pid)
                self.returncodes[pid] = os.waitstatus_to_exitcode(status)

    def answer(self) -> bool:
        """Serve one request; False when the owner has closed its end."""
        room = socket.CMSG_SPACE(MOST_FDS * 4)
        try:
            packet, ancillary, _flags, _address = self.control.recvmsg(LARGEST_REQUEST, room, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return False
        if not packet:
            return False
        fds = [fd for _level, _kind, data in ancillary for fd in memoryview(data).cast("i").tolist()]
        number = None
        try:
            request = marshal.loads(packet)  # noqa: S302 - from our own owner only
            number = request["id"]
            reply = self.serve_one(request, fds)
        except OSError as error:
            reply = {"error": error.strerror or str(error)}
        except Exception as error:  # an answer is owed for every request, or the owner waits for ever
            reply = {"error": f"{type(error).__name__}: {error}"}
        finally:
            for fd in fds:
                os.close(fd)
        try:
            self.control.send(marshal.dumps({**reply, "id": number}))
        except ConnectionError:
            return False
        return True

    def serve_one(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """Do what one request asks for and return the answer; children that ended before are collected by then."""
        self.reap()
        if "spawn" in request:
            return self.spawn(request, fds)
        if "status" in request:
            return {"returncode": self.returncodes.get(request["status"])}
        if "remember" in request:
            self.leases.pop(request["remember"], None)
            if request["record"] is not None:
                self.leases[request["remember"]] = request["record"]
            return {}
        return {"failures": self.end_processes() if request["end"] == "processes" else self.end_leases()}

    def spawn(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """Start a child that the kernel kills when this process ends, and that has nothing it was not given."""
        argv = list(request["spawn"])
        for index, fd in enumerate(fds):
            argv = [word.replace(f"{{fd{index}}}", str(fd)) for word in argv]
        failure, its_end = os.pipe2(os.O_CLOEXEC)
        keeper_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            registry = os.path.join(request["lease"], records.PROCESSES_FILE)
            outputs = request["output"], request["log"]
            run_child(argv, request["environment"], outputs, fds, its_end, registry, keeper_pid)
        os.close(its_end)
        with open(failure, "rb") as pipe:
            reason = pipe.read()
        if reason:
            os.waitpid(pid, 0)
            return {"error": reason.decode(errors="replace")}
        self.spawned.add(pid)
        self.logs.add(pid, request["logs"], request["bound"])
        return {"pid": pid, "start_time_ticks": remains.start_time_ticks(pid)}

    def end_processes(self) -> list[str]:
        """Kill all children and collect them; returns who outlived that, in words."""
        failures = end_processes()
        self.reap()
        return failures

    def end_leases(self) -> list[str]:
        """Remove what the leases name, also those whose record somebody has removed; returns failures in words."""
        failures = []
        for lease, record in self.leases.items():
            if not os.path.exists(os.path.join(lease, records.LEASE_FILE)):
                failures += records.remove_named(record)
        self.leases.clear()
        failures += records.remove_owner_directory(self.directory)
        return failures


def run_child(
    argv: list[str],
    environment: dict[str, str],
    outputs: tuple[str, str],
    fds: list[int],
    failure: int,
    registry: str,
    keeper_pid: int,
) -> NoReturn:
    """Become the program, in the forked child: in its own session, dying with the keeper, with default signals.

    It is registered before. What keeps it from that is written to `failure`, which exec closes.
    """
    try:
        os.setsid()
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper_pid:
            raise OSError(0, "the keeper was killed meanwhile")
        for number in IGNORED:
            signal.signal(number, signal.SIG_DFL)
        register(registry)
        os.chdir("/")
        os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
        for number, path in enumerate(outputs, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600), number)
        for fd in fds:
            os.set_inheritable(fd, True)
        os.execvpe(argv[0], [os.fsencode(word) for word in argv], environment)
    except BaseException as error:
        os.write(failure, str(getattr(error, "strerror", None) or error).encode())
    os._exit(127)


def register(path: str) -> None:
    """Add this process to a file of pids and start times."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        # Somebody has removed the directory; this process's parent still knows it.
        return
    os.write(fd, b"%d %d\n" % (os.getpid(), remains.start_time_ticks(os.getpid()) or 0))
    os.close(fd)


def children() -> dict[int, int]:
    """Return pid and start time of this process's living children."""
    pid = os.getpid()
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        listed = [int(child) for child in file.read().split()]
    started = {child: remains.start_time_ticks(child) for child in listed}
    return {child: ticks for child, ticks in started.items() if ticks is not None}


def collect() -> list[tuple[int, int]]:
    """Collect every child that has ended, orphans of children too (see PR_SET_CHILD_SUBREAPER); returns pids and wait statuses."""
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, status))


def end_processes() -> list[str]:
    """Kill all children, and the children they leave behind; returns who outlived that, in words."""
    deadline = time.monotonic() + END_S
    while living := children():
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return [f"process {pid} outlived SIGKILL" for pid in living]
        remains.kill_and_wait(living, remaining)
    return []


def keep(owners: list[tuple[int, int]], first: int, control: socket.socket, directory: str) -> int:
    """Keep until an owner or the first process is gone, then clean up; returns the exit status."""
    child_ended, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
    keeper = Keeper(control, directory)
    pidfds = []
    try:
        pidfds = [os.pidfd_open(pid) for pid in (first, *(pid for pid, _ticks in owners))]
        # A pid may have been another process's before its descriptor was open.
        if os.getppid() == first and all(remains.start_time_ticks(pid) == ticks for pid, ticks in owners):
            control.send(marshal.dumps({"id": 0}))
            keeper.serve(pidfds, child_ended)
    except ProcessLookupError:
        # One of them was gone before.
        pass
    finally:
        if len(owners) > 1 and remains.start_time_ticks(owners[1][0]) != owners[1][1]:
            end_worker(owners[0], pidfds)
        failures = keeper.end_processes()
        failures += keeper.end_leases()
        for failure in failures:
            sys.stderr.write(f"pytest-chvm keeper: {failure}\n")
    remove_run_directory(directory)
    return 1 if failures else 0


def end_worker(owner: tuple[int, int], pidfds: list[int]) -> None:
    """Tell a worker whose controller is gone to end: it would notice by itself, after up to ten seconds."""
    if remains.start_time_ticks(owner[0]) == owner[1] and len(pidfds) > 1:
        signal.pidfd_send_signal(pidfds[1], signal.SIGTERM)


def remove_run_directory(directory: str) -> None:
    """Remove the directory above, if this was the last one in it."""
    try:
        os.rmdir(os.path.dirname(directory))
    except OSError:
        # Another worker's directory is in it.
        return


def refuse(control: socket.socket, error: OSError) -> int:
    """Tell the owner why it has no keeper; returns the exit status."""
    control.send(marshal.dumps({"id": 0, "error": error.strerror}))
    return 1


def main(arguments: list[str]) -> int:
    """Be the first process; returns the exit status."""
    owners = [(int(pid), int(ticks)) for pid, _, ticks in (owner.partition(":") for owner in arguments[0].split(","))]
    directory, control_fd = arguments[1], int(arguments[2])
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    control = socket.socket(fileno=control_fd)
    lock_file = os.path.join(directory, records.LOCK_FILE)
    try:
        lock = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not lockfiles.try_lock(lock):
            raise BlockingIOError(errno.EWOULDBLOCK, "another keeper has its lock")
        register(lock_file)
    except OSError as error:
        return refuse(control, error)
    # It came through an exec, and goes through no other: what is in a VMM's hands must not reach the owner.
    os.set_inheritable(control_fd, False)
    first = os.getpid()
    second = os.fork()
    if second == 0:
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
        status = 1
        try:
            register(lock_file)
            status = keep(owners, first, control, directory)
        except OSError as error:
            status = refuse(control, error)
        finally:
            os._exit(status)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == second:
            break
    # The owner sees the end of the socket, which is open here too, when everything is gone.
    if status:
        failures = end_processes() + records.remove_owner_directory(directory)
        collect()
        remove_run_directory(directory)
        return 1 if failures else 0
    return 0

"""The keeper: a small process that is the parent of every VMM and sidecar, and outlives their owner.

Run as a script, `keeper.py OWNER_PID DIRECTORY CONTROL_FD`, in a session of its own. It ignores the signals of a
terminal, waits for the end of its socket to the owner *and* for the owner's pidfd (a forked child can hold
the socket open), and then kills its children and removes what the leases in its directory name.

Standard library only: it starts once per worker, within milliseconds, and stays small. The kernel kills its
children should it be killed itself (PR_SET_PDEATHSIG), and its lock on DIRECTORY/lock is then free: whoever
finds that lock free, and the owner gone, may remove the rest.

Requests are one marshalled dict per packet (importing json would take a third of the start-up), with file descriptors
beside it; each gets one marshalled dict back:

    {"spawn": [ARGV...], "environment": {...}, "log": PATH}   -> {"pid": N, "start_time_ticks": N}
        "{fd0}", "{fd1}" in an argument become the numbers of the descriptors sent along
    {"status": PID}                                           -> {"returncode": N or None}
    any that failed                                           -> {"error": TEXT}
"""

from __future__ import annotations

import ctypes
import fcntl
import marshal
import os
import select
import signal
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

if __name__ == "__main__":
    # Run by path, isolated (-I -S): the sibling it shares with the package is beside it.
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

    import remains  # type: ignore[import-not-found]
else:
    from pytest_chvm.host import remains

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LARGEST_REQUEST = 1 << 20
GRACE_S = 1.5
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)

_libc = ctypes.CDLL(None, use_errno=True)


class Keeper:
    """The children, and what became of those that ended."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.returncodes: dict[int, int] = {}
        self.spawned: set[int] = set()

    def serve(self, owner_pidfd: int, child_ended: int) -> None:
        """Answer requests until the owner is gone."""
        poll = select.poll()
        for fd in (self.control.fileno(), owner_pidfd, child_ended):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _events in poll.poll()}
            if child_ended in ready:
                os.read(child_ended, 4096)
                self.reap()
            if self.control.fileno() in ready and not self.answer():
                return
            if owner_pidfd in ready:
                return

    def reap(self) -> None:
        """Collect every child that ended, orphans of children too (this process is their subreaper)."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self.spawned:
                self.spawned.discard(pid)
                self.returncodes[pid] = os.waitstatus_to_exitcode(status)

    def answer(self) -> bool:
        """Serve one request; False when the owner has closed its end."""
        try:
            packet, fds, _flags, _address = socket.recv_fds(self.control, LARGEST_REQUEST, 16)
        except ConnectionError:
            return False
        if not packet:
            return False
        try:
            request = marshal.loads(packet)  # noqa: S302 - from our own owner only
            reply = self.spawn(request, fds) if "spawn" in request else self.status(request["status"])
        except OSError as error:
            reply = {"error": error.strerror or str(error)}
        except Exception as error:  # an answer is owed for every request, or the owner waits for ever
            reply = {"error": f"{type(error).__name__}: {error}"}
        finally:
            for fd in fds:
                os.close(fd)
        try:
            self.control.send(marshal.dumps(reply))
        except ConnectionError:
            return False
        return True

    def spawn(self, request: dict, fds: list[int]) -> dict:  # type: ignore[type-arg]
        """Start a child that the kernel kills when this process ends, and that has nothing it was not given."""
        argv = list(request["spawn"])
        for index, fd in enumerate(fds):
            argv = [word.replace(f"{{fd{index}}}", str(fd)) for word in argv]
        failure, its_end = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            run_child(argv, request["environment"], request["log"], fds, its_end)
        os.close(its_end)
        with open(failure, "rb") as pipe:
            reason = pipe.read()
        if reason:
            os.waitpid(pid, 0)
            return {"error": reason.decode(errors="replace")}
        self.spawned.add(pid)
        return {"pid": pid, "start_time_ticks": remains.start_time_ticks(pid)}

    def status(self, pid: int) -> dict:  # type: ignore[type-arg]
        """Return how a child ended, or that it has not."""
        self.reap()
        return {"returncode": self.returncodes.get(pid)}


def run_child(argv: list[str], environment: dict[str, str], log: str, fds: list[int], failure: int) -> NoReturn:
    """Become the program, in the forked child: in its own session, dying with the keeper, with default signals.

    What keeps it from that is written to `failure`, which exec closes.
    """
    try:
        os.setsid()
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in IGNORED:
            signal.signal(number, signal.SIG_DFL)
        os.chdir("/")
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for fd in fds:
            os.set_inheritable(fd, True)
        os.execvpe(argv[0], [os.fsencode(word) for word in argv], environment)
    except BaseException as error:
        os.write(failure, str(getattr(error, "strerror", None) or error).encode())
    os._exit(127)


def children() -> list[int]:
    """Return this process's living children."""
    pid = os.getpid()
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        listed = file.read().split()
    return [int(child) for child in listed if remains.start_time_ticks(int(child)) is not None]


def end_everything(directory: str) -> None:
    """Kill all children and the children they leave behind, then remove what the leases name."""
    for _generation in range(8):
        living = children()
        if not living:
            break
        remains.kill_and_wait(living, GRACE_S)
    for entry in sorted(os.listdir(directory)):
        lease = os.path.join(directory, entry)
        if os.path.isdir(lease):
            for failure in remains.remove_lease(lease):
                sys.stderr.write(f"pytest-chvm keeper: {failure}\n")
    remains.remove_tree(directory)
    try:
        os.rmdir(os.path.dirname(directory))
    except OSError:
        # Another worker's directory is in it.
        return


def main(owner_pid: int, directory: str, control_fd: int) -> None:
    """Keep until the owner is gone, then clean up."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    lock = os.open(os.path.join(directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    child_ended, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
    # It came through an exec, and goes through no other: what is in a VMM's hands must not reach the owner.
    os.set_inheritable(control_fd, False)
    control = socket.socket(fileno=control_fd)
    try:
        owner = os.pidfd_open(owner_pid)
        # It may have died before the pidfd was open; the socket's end then says so.
        control.send(marshal.dumps({"ready": True}))
        Keeper(control).serve(owner, child_ended)
    finally:
        end_everything(directory)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))

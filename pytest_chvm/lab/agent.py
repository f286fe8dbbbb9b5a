"""Process 1 of the lab, in the host's file system: runs one command for the host, over a virtio-serial port.

Run as a script by the Python that runs the host's side. It imports what is built into the interpreter and little else,
because every import costs some 50 ms in an emulated machine.

Frames go both ways: a letter, the length as four bytes, the data.

    to the lab:   J the job, a marshalled dict (made in pytest_chvm.lab); I input, empty at its end; W the terminal's rows, columns
    to the host:  H at the start; O and E output; X the exit status, one byte
"""

from __future__ import annotations

import marshal
import os
import select
import time

CHANNEL = "chvm.lab"
HEADER_SIZE = 5
CHUNK = 1 << 16
# Held back for a command that does not read: beyond it the host waits.
LARGEST_BACKLOG = 1 << 18
READABLE = select.POLLIN | select.POLLHUP | select.POLLERR

NOT_FOUND = 127
NOT_EXECUTABLE = 126


def frame(kind: bytes, data: bytes) -> bytes:
    """Return one frame."""
    return kind + len(data).to_bytes(4, "big") + data


def take_frame(pending: bytearray) -> tuple[bytes, bytes] | None:
    """Remove the first whole frame from what has arrived and return its letter and data."""
    if len(pending) < HEADER_SIZE:
        return None
    end = HEADER_SIZE + int.from_bytes(pending[1:HEADER_SIZE], "big")
    if len(pending) < end:
        return None
    kind, data = bytes(pending[:1]), bytes(pending[HEADER_SIZE:end])
    del pending[:end]
    return kind, data


def write_all(fd: int, data: bytes) -> None:
    """Write all of it, however long that takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def open_port() -> int:
    """Return the virtio-serial port to the host.

    The driver learns names after it has announced ports, and sysfs has no event for that: looked at every 10 ms, for 10 s.
    """
    base = "/sys/class/virtio-ports"
    for _attempt in range(1000):
        for port in os.listdir(base):
            if os.path.exists(f"{base}/{port}/name"):
                with open(f"{base}/{port}/name") as file:
                    if file.read().strip() == CHANNEL:
                        return os.open(f"/dev/{port}", os.O_RDWR | os.O_CLOEXEC)
        select.select([], [], [], 0.01)
    raise FileNotFoundError(f"no virtio-serial port named {CHANNEL}")


class Session:
    """One command, and the traffic between it and the host."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.pending = bytearray()
        self.input = bytearray()
        self.input_ended = False
        self.stdin = -1
        # Descriptor of an output and its frames' letter.
        self.outputs: dict[int, bytes] = {}
        self.terminal = -1
        self.pidfd = -1

    def send(self, kind: bytes, data: bytes) -> None:
        """Send one frame to the host."""
        write_all(self.port, frame(kind, data))

    def job(self) -> dict:  # type: ignore[type-arg]
        """Wait for the job."""
        # Blocks until the host has connected: reading before that gives an end of file.
        self.send(b"H", b"")
        while True:
            self.pending += os.read(self.port, CHUNK)
            if found := take_frame(self.pending):
                job: dict = marshal.loads(found[1])  # type: ignore[type-arg]
                return job

    def start(self, job: dict) -> int:  # type: ignore[type-arg]
        """Start the command; returns its pid."""
        if job["terminal"]:
            self.terminal, theirs = os.openpty()
            self.resize(job["terminal"])
            inner = (theirs, theirs, theirs)
            self.stdin = os.dup(self.terminal)
            self.outputs = {self.terminal: b"O"}
        else:
            stdin, self.stdin = os.pipe()
            out, stdout = os.pipe()
            err, stderr = os.pipe()
            inner = (stdin, stdout, stderr)
            self.outputs = {out: b"O", err: b"E"}
        pid = os.fork()
        if pid == 0:
            become(job, inner)
        for fd in {*inner}:
            os.close(fd)
        for fd in (self.stdin, *self.outputs):
            os.set_blocking(fd, False)
        self.pidfd = os.pidfd_open(pid)
        return pid

    def resize(self, size: tuple[int, int]) -> None:
        """Tell the terminal its size in characters."""
        import fcntl
        import termios

        rows, columns = size
        packed = b"".join(value.to_bytes(2, "little") for value in (rows, columns, 0, 0))
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, packed)

    def serve(self) -> None:
        """Carry input and outputs until the command has ended."""
        # What has come together with the job.
        self.take_frames()
        self.feed()
        while True:
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            for fd in self.outputs:
                poll.register(fd, select.POLLIN)
            if len(self.input) < LARGEST_BACKLOG:
                poll.register(self.port, select.POLLIN)
            if self.input and self.stdin >= 0:
                poll.register(self.stdin, select.POLLOUT)
            ready = dict(poll.poll())
            for fd in list(self.outputs):
                if fd in ready:
                    self.forward(fd)
            if ready.get(self.port, 0) & select.POLLIN:
                self.take()
            self.feed()
            if self.pidfd in ready:
                # What it wrote last; what it left running may go on writing and is not waited for.
                for fd in list(self.outputs):
                    while self.forward(fd):
                        continue
                return

    def forward(self, fd: int) -> bool:
        """Send some output on; False when there is none for now."""
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            # A terminal that nobody has open any more.
            data = b""
        if data:
            self.send(self.outputs[fd], data)
        else:
            del self.outputs[fd]
        return bool(data)

    def take(self) -> None:
        """Take what the host has sent."""
        self.pending += os.read(self.port, CHUNK)
        self.take_frames()

    def take_frames(self) -> None:
        """Take what has arrived whole."""
        while found := take_frame(self.pending):
            kind, data = found
            if kind == b"W":
                self.resize((int.from_bytes(data[:2], "big"), int.from_bytes(data[2:], "big")))
            elif data:
                self.input += data
            else:
                self.input_ended = True

    def feed(self) -> None:
        """Give the command what input it takes now."""
        if self.stdin < 0:
            self.input.clear()
            return
        try:
            if self.input:
                del self.input[: os.write(self.stdin, self.input[:CHUNK])]
        except BlockingIOError:
            return
        except OSError:
            # It has closed its standard input: the rest is for nobody.
            self.input.clear()
            self.input_ended = True
        if self.input_ended and not self.input:
            os.close(self.stdin)
            self.stdin = -1


def become(job: dict, inner: tuple[int, int, int]) -> None:  # type: ignore[type-arg]
    """In the child: become the command; never returns."""
    status = NOT_EXECUTABLE
    try:
        os.setsid()
        if job["terminal"]:
            import fcntl
            import termios

            fcntl.ioctl(inner[0], termios.TIOCSCTTY, 0)
        for number, fd in enumerate(inner):
            os.dup2(fd, number)
        name = os.fsdecode(job["command"][0])
        os.umask(job["umask"])
        try:
            os.chdir(job["cwd"])
        except OSError as error:
            complain(f"the lab has no working directory {os.fsdecode(job['cwd'])!r}: {error.strerror}")
            return
        # SIGPIPE and SIGXFSZ are ignored by Python, which a new program would inherit.
        restore_signals()
        try:
            os.execvpe(job["command"][0], job["command"], job["environment"])
        except FileNotFoundError:
            status = NOT_FOUND
            complain(f"{name}: not found")
        except OSError as error:
            complain(f"{name}: {error.strerror}")
    finally:
        os._exit(status)


def restore_signals() -> None:
    """Give SIGPIPE and SIGXFSZ their default action back, without the import of `signal` and its enumerations."""
    import _signal  # type: ignore[import-not-found]

    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)


def complain(text: str) -> None:
    """Say something on the command's standard error."""
    write_all(2, f"chvm lab: {text}\n".encode(errors="surrogateescape"))


def prepare(job: dict) -> None:  # type: ignore[type-arg]
    """Set up what the command expects of the machine."""
    time.clock_settime(time.CLOCK_REALTIME, job["time"])
    for node in ("/dev/kvm", "/dev/net/tun"):
        if os.path.exists(node):
            os.chmod(node, 0o666)
    release = os.uname().release
    if job["modules"] and not os.path.exists(f"/lib/modules/{release}"):
        os.makedirs("/lib/modules", exist_ok=True)
        os.symlink(job["modules"], f"/lib/modules/{release}")
        # Its index is BusyBox's, which kmod cannot read.
        os.makedirs("/sbin", exist_ok=True)
        if os.path.lexists("/sbin/modprobe"):
            os.unlink("/sbin/modprobe")
        os.symlink(job["busybox"], "/sbin/modprobe")
    if job["writable"]:
        mount_shares(job["writable"])


def mount_shares(shares: list[tuple[str, bytes]]) -> None:
    """Mount shared dirs where they are on the host."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    for tag, path in shares:
        os.makedirs(path, exist_ok=True)
        if libc.mount(tag.encode(), path, b"virtiofs", 0, None) != 0:
            raise OSError(ctypes.get_errno(), f"{os.fsdecode(path)} cannot be mounted")


def write_back(shares: list[tuple[str, bytes]]) -> None:
    """Have the kernel write what programs left in memory maps to the shared dirs."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    for _tag, path in shares:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        libc.syncfs(fd)
        os.close(fd)


def main() -> None:
    """Run the host's job and tell how it ended."""
    session = Session(open_port())
    job = session.job()
    prepare(job)
    pid = session.start(job)
    session.serve()
    _pid, status = os.waitpid(pid, 0)
    if job["writable"]:
        write_back(job["writable"])
    code = os.waitstatus_to_exitcode(status)
    session.send(b"X", bytes([code if code >= 0 else 128 - code]))
    # The host ends the machine.
    while True:
        select.select([], [], [])


def reap_for_ever() -> None:
    """As process 1: collect the orphans, and end the machine (by a panic) should the agent end."""
    agent = os.fork()
    if agent == 0:
        return
    while os.wait()[0] != agent:
        continue
    os._exit(1)


if __name__ == "__main__":
    reap_for_ever()
    main()

"""The lab: a machine with KVM made of software, that sees the host's file system, for one command.

QEMU emulates a processor with AMD's virtualisation and nested paging, so that `/dev/kvm` works inside wherever QEMU runs.
The root file system is the host's, read-only over virtio-fs, with a layer in memory on top that goes with the machine.
"""

from __future__ import annotations

import fcntl
import marshal
import os
import platform
import select
import signal
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pytest_chvm.base.deadline import Deadline, poll_until, wait_readable
from pytest_chvm.base.progress import show_progress
from pytest_chvm.base.text import as_one_word
from pytest_chvm.base.watch import FileWatch
from pytest_chvm.errors import BootFailedError, InvalidConfigError, UnsupportedError, VmIOError
from pytest_chvm.guest.initramfs import build_initramfs, find_busybox
from pytest_chvm.guest.kernels.kernel import Kernel, inspect_kernel
from pytest_chvm.guest.kernels.modules import index_modules
from pytest_chvm.host.kvm import why_no_kvm
from pytest_chvm.lab import agent
from pytest_chvm.machine.guest_choice import built_in_kernel, cache_dir
from pytest_chvm.machine.launcher import launch
from pytest_chvm.machine.vm import Vm
from pytest_chvm.model import SharedDir, VmConfig
from pytest_chvm.settings import Settings

DEFAULT_MEMORY_MB = 2048
BOOT_TIMEOUT_S = 120.0
END_TIMEOUT_S = 2.0
# timeout(1)'s, for a command that was ended by its time limit.
TIMED_OUT = 124
CPU_MODEL = "EPYC,+svm,+npt"
MODULES = (
    "virtio_pci",
    "virtio_console",
    "virtiofs",
    "virtio_rng",
    "overlay",
    "kvm_amd",
    "tun",
    "bridge",
    "loop",
    "vhost_vsock",
    "ext4",
    "af_packet",
)
# `tsc=reliable`: with another clock source the C library's clock calls become system calls, which Cloud Hypervisor's seccomp
# filter does not expect. No watchdog: an emulated processor on a busy host looks locked up to it. A periodic tick (`nohz=off
# highres=off`): on a busy host a one-shot timer interrupt that comes while a nested guest runs can be lost, and everything then
# stands still until some other device interrupts; a periodic one comes again. The rest shortens the boot.
CMDLINE = (
    "console=ttyS0 quiet panic=-1 tsc=reliable clocksource=tsc nowatchdog nohz=off highres=off no_timer_check mitigations=off "
    "nokaslr rcupdate.rcu_expedited=1 cryptomgr.notests random.trust_cpu=on"
)
CHUNK = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """The descriptors a lab's command reads and writes through."""

    stdin: int = 0
    stdout: int = 1
    stderr: int = 2

    @property
    def terminal(self) -> bool:
        """Whether all of them are a terminal."""
        return all(os.isatty(fd) for fd in (self.stdin, self.stdout, self.stderr))


STANDARD_STREAMS = Streams()


def run(
    command: Sequence[str] = (),
    *,
    memory_mb: int = DEFAULT_MEMORY_MB,
    writable: Sequence[Path] = (),
    timeout: float | None = None,
    kernel: Path | None = None,
    force: bool = False,
    streams: Streams = STANDARD_STREAMS,
) -> int:
    """Run a command where KVM works, in the lab unless this machine is such a place (`force`: even then); returns its exit status.

    No command: the user's shell, on a terminal if there is one. `writable`: directories that keep what is written to them.
    `timeout`: seconds, from now, after which all is ended and 124 returned. `kernel`: the lab's, with its modules beside it as in
    an unpacked package (default: the built-in guest's). Raises VmError where the lab cannot be had.
    """
    words = list(command) or [os.environ.get("SHELL") or "/bin/sh"]
    if why_no_kvm() is None and not force:
        _say(streams, "KVM works on this machine: running the command directly (--force: in the lab all the same)")
        return _run_directly(words, timeout, streams)
    # Only a shell is for a person to type into: the outputs of a command stay apart, and its bytes as they are.
    lab_kernel = built_in_kernel(_settings()) if kernel is None else inspect_kernel(kernel)
    return _run_in_lab(words, lab_kernel, memory_mb, writable, timeout, streams, on_terminal=not command and streams.terminal)


def _say(streams: Streams, text: str) -> None:
    agent.write_all(streams.stderr, f"chvm lab: {text}\n".encode(errors="surrogateescape"))


def _run_directly(command: list[str], timeout: float | None, streams: Streams) -> int:
    deadline = None if timeout is None else Deadline.after(timeout)
    try:
        child = subprocess.Popen(command, stdin=streams.stdin, stdout=streams.stdout, stderr=streams.stderr)
    except OSError as error:
        _say(streams, f"{command[0]}: {error.strerror}")
        return agent.NOT_FOUND if isinstance(error, FileNotFoundError) else agent.NOT_EXECUTABLE
    try:
        code = child.wait(None if deadline is None else deadline.remaining_s)
    except subprocess.TimeoutExpired:
        assert deadline is not None
        child.kill()
        child.wait()
        return _timed_out(streams, deadline)
    except KeyboardInterrupt:
        # The terminal has told it too, and it may have something to say.
        code = child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    return code if code >= 0 else 128 - code


def _run_in_lab(
    command: list[str],
    kernel: Kernel,
    memory_mb: int,
    writable: Sequence[Path],
    timeout: float | None,
    streams: Streams,
    *,
    on_terminal: bool,
) -> int:
    shares = _shares(writable)
    deadline = None if timeout is None else Deadline.after(timeout)
    boot_timeout = BOOT_TIMEOUT_S if timeout is None else min(timeout, BOOT_TIMEOUT_S)
    with ExitStack() as stack:
        try:
            vm = stack.enter_context(_boot(kernel, memory_mb, shares, boot_timeout))
        except BootFailedError:
            if deadline is None or not deadline.expired:
                raise
            return _timed_out(streams, deadline)
        channel = stack.enter_context(vm.open_channel(agent.CHANNEL))
        job = {
            "command": [os.fsencode(word) for word in command],
            "cwd": os.fsencode(os.getcwd()),
            "environment": dict(os.environb),
            "umask": _umask(),
            "terminal": _window_size(streams.stdin) if on_terminal else None,
            "modules": _modules(kernel),
            "busybox": os.fspath(_busybox()),
            "writable": [(share.tag, os.fsencode(share.host_path)) for share in shares],
        }
        session = _Session(vm, channel.fileno(), streams, job)
        if on_terminal:
            stack.enter_context(_raw(streams.stdin))
        status = session.carry(deadline, on_terminal=on_terminal)
    if status is None:
        assert deadline is not None
        return _timed_out(streams, deadline)
    return status


def _timed_out(streams: Streams, deadline: Deadline) -> int:
    _say(streams, f"ended after {deadline.total_s:g} s (--timeout)")
    return TIMED_OUT


def _shares(writable: Sequence[Path]) -> list[SharedDir]:
    shares = []
    # Shortest first, so that one inside another is mounted over it.
    for index, path in enumerate(sorted({Path(os.path.realpath(path)) for path in writable})):
        if not path.is_dir():
            raise InvalidConfigError(f"--rw {str(path)!r} is not a directory")
        shares.append(SharedDir(f"rw{index}", path, cache="auto"))
    return shares


def _settings() -> Settings:
    # The options of VMs are for those that the command will start inside, but for these two.
    mine = ("CHVM_CACHE_DIR", "CHVM_VIRTIOFSD")
    return Settings.resolve(environment={key: os.environ[key] for key in mine if key in os.environ})


def _busybox() -> Path:
    return find_busybox(cache_dir(_settings()), show_progress)


def _modules(kernel: Kernel) -> str | None:
    """Return where the kernel's modules are on the host, with an index for modprobe."""
    tree = kernel.modules_dir
    if tree is not None:
        index_modules(tree, _busybox())
    return None if tree is None else os.fspath(tree)


def _boot(kernel: Kernel, memory_mb: int, shares: list[SharedDir], boot_timeout: float) -> Vm:
    if platform.machine() != "x86_64":
        raise UnsupportedError(f"the lab emulates an x86-64 processor, for programs of this machine, which is {platform.machine()}")
    settings = _settings()
    initramfs = build_initramfs(kernel, cache_dir(settings), show_progress, init_script="lab_init.sh", wanted=MODULES)
    words = [sys.executable, "-I", "-S", "-B", os.path.abspath(agent.__file__)]
    config = VmConfig(
        name="chvm-lab",
        kernel=kernel.image,
        initramfs=initramfs,
        cmdline=f"{CMDLINE} chvm.root=root chvm.exec={','.join(map(as_one_word, words))}",
        # With two, the machine's kernel has locked up in the VMM's thread.
        cpus=1,
        memory_mb=memory_mb,
        networks=(),
        shared_dirs=(SharedDir("root", Path("/"), read_only=True, cache="always", announce_submounts=False), *shares),
        cpu=CPU_MODEL,
        channels=(agent.CHANNEL,),
    )
    return launch(config, settings=settings, vmm="qemu", accel="tcg", boot_timeout=boot_timeout)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _window_size(fd: int) -> tuple[int, int]:
    packed = fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8))
    rows, columns = (int.from_bytes(packed[start : start + 2], "little") for start in (0, 2))
    return rows, columns


@contextmanager
def _raw(fd: int) -> Iterator[None]:
    """Hand every key to the lab, until the end."""
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextmanager
def _window_changes() -> Iterator[int]:
    """Give a descriptor that is readable when the terminal's window may have changed."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.signal(signal.SIGWINCH, lambda _number, _frame: None)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGWINCH, before)
        os.close(reader)
        os.close(writer)


class _Session:
    """The traffic between this process's streams and the lab's command."""

    def __init__(self, vm: Vm, channel: int, streams: Streams, job: dict[str, object]) -> None:
        self.vm = vm
        self.channel = channel
        self.streams = streams
        self.arrived = bytearray()
        self.to_send = bytearray()
        # Of no use before the lab has its job, which comes first.
        self.input_open = False
        self.job = job
        os.set_blocking(channel, False)

    def carry(self, deadline: Deadline | None, *, on_terminal: bool) -> int | None:
        """Carry input and outputs until the command has ended; returns its exit status, None at the deadline."""
        with ExitStack() as stack:
            pidfd = os.pidfd_open(self.vm.pid)
            stack.callback(os.close, pidfd)
            serial = stack.enter_context(FileWatch(self.vm.serial_log))
            window = stack.enter_context(_window_changes()) if on_terminal else -1
            while True:
                ready = self._poll([pidfd, serial.fileno(), *([window] if on_terminal else [])], deadline)
                if self.channel in ready and (status := self._receive(pidfd)) is not None:
                    return status
                if self.streams.stdin in ready:
                    self._read_input()
                if window in ready:
                    os.read(window, CHUNK)
                    rows, columns = _window_size(self.streams.stdin)
                    self.to_send += agent.frame(b"W", rows.to_bytes(2, "big") + columns.to_bytes(2, "big"))
                if pidfd in ready or serial.fileno() in ready:
                    serial.clear()
                    self.vm.machine.check_alive()
                if deadline is not None and deadline.expired:
                    return None
                self._send()

    def _poll(self, wakes: list[int], deadline: Deadline | None) -> dict[int, int]:
        poll = select.poll()
        for fd in wakes:
            poll.register(fd, select.POLLIN)
        poll.register(self.channel, select.POLLIN | (select.POLLOUT if self.to_send else 0))
        if self.input_open and len(self.to_send) < agent.LARGEST_BACKLOG:
            poll.register(self.streams.stdin, select.POLLIN)
        return dict(poll.poll() if deadline is None else poll_until(poll, deadline))

    def _receive(self, pidfd: int) -> int | None:
        try:
            data = os.read(self.channel, CHUNK)
        except BlockingIOError:
            return None
        except ConnectionError:
            data = b""
        if not data:
            # QEMU closes it on its way out, and why it ended is what a person wants to know.
            wait_readable([pidfd], Deadline.after(END_TIMEOUT_S))
            self.vm.machine.check_alive()
            raise VmIOError("the lab's machine has closed its channel")
        self.arrived += data
        while found := agent.take_frame(self.arrived):
            kind, content = found
            if kind == b"H":
                # Only now, so that the lab's clock is right.
                self.to_send += agent.frame(b"J", marshal.dumps({**self.job, "time": time.time()}))
                self.input_open = True
            if kind == b"X" and len(content) == 1:
                return content[0]
            if kind in (b"O", b"E"):
                agent.write_all(self.streams.stdout if kind == b"O" else self.streams.stderr, content)
        return None

    def _read_input(self) -> None:
        try:
            data = os.read(self.streams.stdin, CHUNK)
        except OSError:
            # Closed, or a terminal this process may not read: there is no input.
            data = b""
        self.input_open = bool(data)
        self.to_send += agent.frame(b"I", data)

    def _send(self) -> None:
        try:
            while self.to_send:
                del self.to_send[: os.write(self.channel, self.to_send[:CHUNK])]
        except (BlockingIOError, ConnectionError):
            # An end is noticed where the channel is read.
            return

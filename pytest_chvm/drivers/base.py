"""What every driver does the same: the protocol, the order of a boot, and stop, kill and state.

A driver turns a `VmConfig` into a command line and speaks its VMM's control protocol. It never waits for the
guest, and never chooses what is started.
"""

from __future__ import annotations

import logging
import os
import shlex
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from pytest_chvm.drivers.preflight import preflight
from pytest_chvm.errors import (
    HypervisorError,
    InvalidConfigError,
    StateFailedError,
    StopFailedError,
    VmError,
    VmIOError,
    VmNotFoundError,
)
from pytest_chvm.guest.ready import DEFAULT_MARKER, ReadyScanner
from pytest_chvm.host import records, remains
from pytest_chvm.host.binaries import Binary
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.networks import interface_exists, make_tap, remove_taps
from pytest_chvm.host.processes import end_all, end_process, is_running, keeper
from pytest_chvm.host.runs import count_started
from pytest_chvm.host.virtiofsd import PROGRAMS as SIDECAR_PROGRAMS
from pytest_chvm.host.virtiofsd import find_virtiofsd, lease_lock_file, start_virtiofsd
from pytest_chvm.model import ProcessIdentity, SharedDir, SocketPairFd, Tap, VmConfig, VmHandle, VmState, VmStatus, mac_for
from pytest_chvm.text import last_lines

logger = logging.getLogger("pytest_chvm")

STOP_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 2.0
SIDECAR_TIMEOUT_S = 1.0

# In a snapshot's directory, beside the VMM's own: the memory where it is a file, and the console's log up to then.
MEMORY_FILE = "memory"
CONSOLE_FILE = "console.log"
MEMORY_COPY_NAME = "guest-memory"


@dataclass(frozen=True, slots=True)
class BootOptions:
    """What a boot has beside the VM's config.

    `lease`: where the caller has leased the VM's networks already. `console`: the guest is to have a virtio console, for the shell.
    `nonce`: what the ready line must have after the IP. `memory_file`: the guest's memory is that file, so that a snapshot in the
    same directory need not copy it. `snapshots`: below which snapshots of the VM will be.
    """

    lease: Lease | None = None
    console: bool = False
    ready_marker: str = DEFAULT_MARKER
    nonce: str | None = None
    memory_file: Path | None = None
    snapshots: Path | None = None


DEFAULT_OPTIONS = BootOptions()


class VmDriver(Protocol):
    """A VMM. Thread-safe; an operation that it does not have raises UnsupportedError."""

    vmm: str

    def why_not(self) -> str | None:
        """Return why this VMM is no good choice on this machine, or None where it is one."""

    def binary(self) -> Binary:
        """Return the VMM's executable; raises InvalidConfigError where there is none that works."""

    def snapshot_key(self) -> list[str]:
        """Return what of the VMM itself a snapshot depends on."""

    def failure_hint(self) -> str | None:
        """Return what a person should know of this machine when the VMM has failed on it."""

    def boot(self, config: VmConfig, options: BootOptions = DEFAULT_OPTIONS) -> VmHandle:
        """Start a VM and return at once, STARTING; whatever fails leaves nothing behind."""

    def stop(self, handle: VmHandle) -> None:
        """End the VMM with SIGTERM, after 10 s with SIGKILL, and remove all that the VM had."""

    def kill(self, handle: VmHandle) -> None:
        """End the VMM with SIGKILL and remove all that the VM had."""

    def state(self, handle: VmHandle) -> VmStatus:
        """Return what has become of a VM; asking changes nothing."""

    def open_console(self, handle: VmHandle) -> int:
        """Return a descriptor of the guest's virtio console, for the shell."""

    def open_channel(self, handle: VmHandle, name: str) -> int:
        """Return a descriptor of the host's end of one of the config's channels."""

    def info(self, handle: VmHandle) -> dict[str, object]:
        """Return what the VMM says of the VM, in its own words."""

    def counters(self, handle: VmHandle) -> dict[str, object]:
        """Return what the VMM has counted of each device, in its own words."""

    def event_log(self, handle: VmHandle) -> Path | None:
        """Return the file that grows when something befalls the guest, where the VMM keeps one."""

    def trouble(self, handle: VmHandle) -> VmError | None:
        """Return what befell the guest that the test must be told of, as far as the VMM has said so."""

    def add_disk(self, handle: VmHandle, image: Path, *, read_only: bool) -> str:
        """Plug a disk in; returns its id."""

    def add_tap(self, handle: VmHandle, tap: str, mac: str) -> str:
        """Plug a NIC in that is attached to a TAP; returns its id."""

    def add_share(self, handle: VmHandle, share: SharedDir, socket_path: Path) -> str:
        """Plug a shared dir in whose virtiofsd listens at `socket_path`; returns its id."""

    def remove_device(self, handle: VmHandle, device: str) -> None:
        """Unplug a device that was plugged in."""

    def resize(self, handle: VmHandle, *, cpus: int | None, memory_mb: int | None) -> None:
        """Give the VM another number of processors or amount of memory."""

    def open_vsock(self, handle: VmHandle, port: int) -> socket.socket:
        """Return a stream connected to a vsock port of the guest's."""

    def listen_vsock(self, handle: VmHandle, port: int) -> socket.socket:
        """Return a listener that the guest reaches at a vsock port of the host's (CID 2)."""

    def forward_port(self, handle: VmHandle, port: int) -> tuple[str, int]:
        """Return where on the host a port of a guest on the user-mode network can be reached."""

    def pause(self, handle: VmHandle) -> None:
        """Stop the guest's processors."""

    def resume(self, handle: VmHandle) -> None:
        """Let a paused guest go on."""

    def power_button(self, handle: VmHandle) -> None:
        """Press the power button; what that does is the guest's to decide."""

    def allow_reboot(self, handle: VmHandle, config: VmConfig) -> VmHandle:
        """Let the next reboot of the guest be one, where it would otherwise be the VMM's end; returns the handle from then on."""

    def snapshot(self, handle: VmHandle, directory: Path) -> None:
        """Save a paused VM's state and memory to a directory; disks are not saved."""

    def restore(self, config: VmConfig, directory: Path, options: BootOptions = DEFAULT_OPTIONS) -> VmHandle:
        """Start a VM from a snapshot's directory and return it running; it writes nothing there.

        `config` may differ from the snapshot's in names, logs, the other end of each NIC, and shared dirs, which are plugged in.
        """


@dataclass(frozen=True, slots=True)
class Memory:
    """A guest's memory as a file: written by the guest where it is `shared`, else only read, copy-on-write."""

    path: str
    shared: bool


@dataclass
class Plan:
    """What a boot has ready when the command line is built; `fds` are given to the VMM and then closed."""

    config: VmConfig
    lease: Lease
    serial_log: Path
    console: bool
    # Of each shared dir, in order.
    share_sockets: list[Path] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)
    taps_to_remove: list[str] = field(default_factory=list)
    machine_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    memory: Memory | None = None
    # The directory of the snapshot that the VM begins with.
    restoring: Path | None = None
    snapshots: Path | None = None

    def socket(self, name: str) -> Path:
        """Return where a socket of this VM's lives, short enough for any address."""
        return self.lease.directory / name

    def add_fd(self, fd: int) -> str:
        """Hand a descriptor over; returns the text that becomes its number in the VMM."""
        self.fds.append(fd)
        return f"{{fd{len(self.fds) - 1}}}"

    def add_listener(self, name: str) -> str:
        """Hand a listening UNIX socket over, which can be connected to from now on; returns the text for its number."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.fspath(self.socket(name)))
        listener.listen()
        return self.add_fd(listener.detach())


@dataclass(frozen=True, slots=True)
class AttachedTap:
    """A TAP that is there, for the VM's NIC number `index`; `ours` is removed with the VM."""

    index: int
    name: str
    mac: str
    ours: bool


@dataclass(frozen=True)
class VmmCommand:
    """A VMM's arguments: `machine` is what a person types to repeat it, `control` is for us to talk to it."""

    machine: list[str]
    control: list[str]
    # What stands for a descriptor in a text for people: `fd={fd0}` -> `ifname=chvm1`.
    shown: dict[str, str] = field(default_factory=dict)

    def for_people(self) -> tuple[str, ...]:
        """Return the arguments as a person would type them."""
        words = self.machine
        for fd, text in self.shown.items():
            words = [word.replace(fd, text) for word in words]
        return tuple(words)


class _LiveNames:
    """The names in use in this run: two VMs of one name and namespace at once are refused."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders: dict[tuple[str, str], ProcessIdentity | None] = {}

    def claim(self, config: VmConfig) -> None:
        key = (config.namespace, config.name)
        with self._lock:
            if key in self._holders:
                holder = self._holders[key]
                # Held without a process: it is being booted. One that is gone holds nothing.
                if holder is None or remains.start_time_ticks(holder.pid) == holder.start_time_ticks:
                    raise InvalidConfigError(
                        f"a VM named {config.name!r} in namespace {config.namespace!r} is running already: "
                        "give this one another name, or stop that one first",
                        vm_name=config.name,
                    )
            self._holders[key] = None

    def started(self, config: VmConfig, process: ProcessIdentity) -> None:
        with self._lock:
            self._holders[config.namespace, config.name] = process

    def free(self, namespace: str, name: str, process: ProcessIdentity | None) -> None:
        with self._lock:
            if (namespace, name) in self._holders and self._holders[namespace, name] in (None, process):
                del self._holders[namespace, name]


_names = _LiveNames()


@dataclass
class VmmProcess:
    """The life of a VMM's process, for the drivers to delegate to.

    `programs` are the names one of which must be in the command line of a process before it is signalled.
    """

    vmm: str
    programs: Sequence[str]
    virtiofsd: Path | None

    def __post_init__(self) -> None:
        self._scanners: dict[str, ReadyScanner] = {}
        self._paused: set[str] = set()
        self._booted_here: set[str] = set()

    def boot(
        self,
        config: VmConfig,
        build: Callable[[Plan], VmmCommand],
        options: BootOptions,
        restoring: Path | None = None,
    ) -> VmHandle:
        """Start a VMM: checks first, then the sidecars, then it. Whatever fails leaves nothing behind."""
        preflight(config)
        _names.claim(config)
        mine = None
        try:
            mine = options.lease or Lease()
            return self._start(config, build, mine, options, restoring)
        except BaseException as error:
            _names.free(config.namespace, config.name, None)
            # With those it had started: they name the lease in their arguments.
            failures = records.remove_lease(mine.directory) if mine is not None else []
            for failure in failures:
                logger.error("%s: left behind by a failed boot: %s", config.name, failure)
            if isinstance(error, VmError):
                error.vm_name = error.vm_name or config.name
            elif isinstance(error, OSError):
                raise VmIOError(f"VM {config.name!r} could not be started: {error}", vm_name=config.name) from error
            raise

    def _start(
        self, config: VmConfig, build: Callable[[Plan], VmmCommand], lease: Lease, options: BootOptions, restoring: Path | None
    ) -> VmHandle:
        serial_log = config.serial_log or lease.directory / "serial.log"
        plan = Plan(config, lease, serial_log, options.console, restoring=restoring, snapshots=options.snapshots)
        if restoring is not None:
            plan.memory = _restored_memory(plan, restoring)
        elif options.memory_file is not None:
            plan.memory = Memory(os.fspath(options.memory_file), shared=True)
            with options.memory_file.open("xb") as file:
                file.truncate(config.memory_mb << 20)
        handle = VmHandle(
            config.name, config.namespace, self.vmm, VmState.STARTING, None, serial_log, plan.machine_id,
            lease.directory, options.ready_marker, options.nonce, netns=config.netns,
        )  # fmt: skip
        _start_log(serial_log, config, restoring and restoring / CONSOLE_FILE)
        _start_log(handle.vmm_log, config)
        sidecars = []
        program = find_virtiofsd(self.virtiofsd) if config.shared_dirs else None
        for index, share in enumerate(config.shared_dirs):
            assert program is not None
            path = plan.socket(f"fs{index}.sock")
            logger.debug("%s: starting virtiofsd for %s", config.name, share.tag)
            lease_lock_file(program, path, lease)
            sidecars.append(start_virtiofsd(program, share, path, lease.directory / f"fs{index}.log"))
            plan.share_sockets.append(path)
        try:
            command = build(plan)
            argv = [*command.machine, *command.control]
            logger.info("%s: %s", config.name, shlex.join(argv))
            process = keeper().spawn(argv, handle.vmm_log, lease.directory, plan.fds)
        finally:
            for fd in plan.fds:
                os.close(fd)
        count_started("VM")
        _names.started(config, process)
        self._booted_here.add(plan.machine_id)
        return replace(
            handle, process=process, taps=tuple(plan.taps_to_remove), sidecars=tuple(sidecars), command=command.for_people()
        )

    @contextmanager
    def restoring(self, handle: VmHandle) -> Iterator[None]:
        """End a VM whose restore fails in the block; raises HypervisorError with what the VMM's log says."""
        try:
            yield
        except BaseException as error:
            said = last_lines(handle.vmm_log)
            self.kill(handle)
            if isinstance(error, VmError):
                raise HypervisorError(
                    f"VM {handle.name!r} could not be restored: {error}{f'. Its log ends with:{chr(10)}{said}' if said else ''}",
                    vm_name=handle.name,
                ) from error
            raise

    def stop(self, handle: VmHandle) -> None:
        """SIGTERM, 10 s of patience, SIGKILL; then everything the VM had is removed, whatever became of the VMM."""
        self._end(handle, term_timeout_s=STOP_TIMEOUT_S)

    def kill(self, handle: VmHandle) -> None:
        """SIGKILL; then everything the VM had is removed."""
        self._end(handle, term_timeout_s=0)

    def _end(self, handle: VmHandle, *, term_timeout_s: float) -> None:
        if handle.process is None:
            raise VmNotFoundError(f"VM {handle.name!r} has no process: it was never started", vm_name=handle.name)
        logger.info("%s: ending pid %d", handle.name, handle.process.pid)
        refused: StateFailedError | None = None
        failures = []
        try:
            killed = end_process(handle.process, self.programs, term_timeout_s=term_timeout_s, kill_timeout_s=KILL_TIMEOUT_S)
            # A handle of another process's is only told of a VMM that outlives SIGKILL.
            if killed and term_timeout_s > 0 and handle.machine_id in self._booted_here:
                failures.append(f"the VMM (pid {handle.process.pid}) ignored SIGTERM for {term_timeout_s:g} s and was killed")
        except StateFailedError as error:
            refused = error
        except TimeoutError as error:
            failures.append(f"the VMM: {error}")
        finally:
            # Also when the test is interrupted just here.
            failures += self._remove(handle)
        if refused is not None:
            refused.vm_name = handle.name
            raise refused
        if failures:
            raise StopFailedError(f"VM {handle.name!r}: {'; '.join(failures)}", vm_name=handle.name)

    def _remove(self, handle: VmHandle) -> list[str]:
        ended = end_all(handle.sidecars, SIDECAR_PROGRAMS, term_timeout_s=SIDECAR_TIMEOUT_S, kill_timeout_s=SIDECAR_TIMEOUT_S)
        failures = [f"virtiofsd: {failure}" for failure in ended]
        failures += remove_taps(handle.taps, handle.netns)
        if handle.run_dir is not None:
            failures += records.remove_lease(handle.run_dir, search=False)
        _names.free(handle.namespace, handle.name, handle.process)
        self._scanners.pop(handle.machine_id, None)
        self._paused.discard(handle.machine_id)
        self._booted_here.discard(handle.machine_id)
        return failures

    def state(self, handle: VmHandle) -> VmStatus:
        """STOPPED when the process is gone or another one; READY once the marker was seen; else RUNNING."""
        if handle.process is None:
            return VmStatus(VmState.STOPPED)
        try:
            if not is_running(handle.process, self.programs):
                return VmStatus(VmState.STOPPED)
        except StateFailedError:
            return VmStatus(VmState.STOPPED)
        ip = self.scanner(handle).scan()
        if handle.machine_id in self._paused:
            return VmStatus(VmState.PAUSED, ip)
        return VmStatus(VmState.READY if ip else VmState.RUNNING, ip)

    def scanner(self, handle: VmHandle) -> ReadyScanner:
        """Return the scanner of a VM's serial log, which remembers how far it has read."""
        fresh = ReadyScanner(handle.serial_log, handle.ready_marker, handle.nonce, nonce_required=handle.nonce is not None)
        return self._scanners.setdefault(handle.machine_id, fresh)

    def renew_sidecars(self, handle: VmHandle, config: VmConfig) -> VmHandle:
        """Start a second virtiofsd at each socket, for a VMM that will connect anew; the first ends with its connection."""
        assert handle.run_dir is not None
        program = find_virtiofsd(self.virtiofsd) if config.shared_dirs else None
        fresh = []
        for index, share in enumerate(config.shared_dirs):
            assert program is not None
            path = handle.run_dir / f"fs{index}.sock"
            fresh.append(start_virtiofsd(program, share, path, path.with_suffix(".log")))
        return replace(handle, sidecars=(*handle.sidecars, *fresh))

    def set_paused(self, handle: VmHandle, paused: bool) -> None:
        """Remember whether a VM is paused."""
        (self._paused.add if paused else self._paused.discard)(handle.machine_id)


def _restored_memory(plan: Plan, snapshot: Path) -> Memory | None:
    """Return what the memory of a restored VM is made of; None where it is in the saved state."""
    memory = snapshot / MEMORY_FILE
    if not memory.exists():
        return None
    if not plan.config.shared_dirs and not plan.config.hotplug:
        return Memory(os.fspath(memory), shared=False)
    # virtiofsd has to see what the guest writes (vhost-user), so that it needs a copy of its own.
    number = plan.add_fd(copied_to_memory(memory))
    return Memory(f"/proc/self/fd/{number}", shared=True)


def copied_to_memory(file: Path) -> int:
    """Return a descriptor of an anonymous file with the content of `file`."""
    copy = os.memfd_create(MEMORY_COPY_NAME, os.MFD_CLOEXEC)
    copy_sparse(file, copy)
    return copy


def copy_sparse(file: Path, copy: int) -> None:
    """Copy a file's content to an empty one that is open, leaving holes out."""
    with file.open("rb") as source:
        size = os.fstat(source.fileno()).st_size
        os.truncate(copy, size)
        position = 0
        while position < size:
            try:
                start = os.lseek(source.fileno(), position, os.SEEK_DATA)
            except OSError:
                # ENXIO: nothing but a hole is left.
                break
            position = os.lseek(source.fileno(), start, os.SEEK_HOLE)
            os.lseek(copy, start, os.SEEK_SET)
            while start < position:
                start += os.sendfile(copy, source.fileno(), start, position - start)


def inherited_memory(pid: int) -> Path | None:
    """Return the guest's memory among a VMM's descriptors, where that is a copy of ours (`/proc/PID/fd/N`)."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        if os.fspath(fd.readlink()).startswith(f"/memfd:{MEMORY_COPY_NAME}"):
            return fd
    return None


def _start_log(log: Path, config: VmConfig, earlier: Path | None = None) -> None:
    # An old marker must never count; the VMM appends, or truncates again.
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(earlier.read_bytes() if earlier is not None and earlier.exists() else b"")
    except OSError as error:
        raise InvalidConfigError(
            f"VM {config.name!r}: the log {str(log)!r} cannot be written: {error.strerror}", vm_name=config.name
        ) from error


def share_id(share: SharedDir) -> str:
    """Return what a VMM calls the device of a shared dir that was plugged in."""
    return f"fs-{share.tag}"


def binary_key(binary: Binary) -> list[str]:
    """Return what tells one build of a program from another."""
    found = binary.path.stat()
    return [os.fspath(binary.path), binary.version, str(found.st_size), str(found.st_mtime_ns)]


def taps_of(plan: Plan) -> list[AttachedTap]:
    """Return the TAPs of a VM, in order; one that is not there yet is made, in the lease first.

    Raises InvalidConfigError for a socket pair, which no VMM on Linux takes.
    """
    config = plan.config
    taps = []
    for index, network in enumerate(config.networks or ()):
        if isinstance(network, SocketPairFd):
            raise InvalidConfigError(
                f"VM {config.name!r}: a socket-pair network works on macOS only, not on Linux: use a Tap", vm_name=config.name
            )
        if isinstance(network, Tap):
            name, ours = network.name, network.take_over
            if name is None or not interface_exists(name, config.netns):
                name, ours = make_tap(plan.lease, name, None, config.netns), True
            elif ours:
                plan.lease.add_tap(name, config.netns)
            if ours:
                plan.taps_to_remove.append(name)
            taps.append(AttachedTap(index, name, network.mac or mac_for(config.name, index), ours))
    return taps

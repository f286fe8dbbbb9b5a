"""What a driver is: the protocol, and what a boot has ready when the command line is built.

A driver turns a `VmConfig` into a command line and speaks its VMM's control protocol. It never waits for the
guest, and never chooses what is started.
"""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pytest_chvm.base.untouched import Socket, random_bytes
from pytest_chvm.drivers.memory import Memory
from pytest_chvm.errors import InvalidConfigError, VmError
from pytest_chvm.guest.ready import DEFAULT_MARKER
from pytest_chvm.host.binaries import Binary
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.networks import interface_exists, make_tap
from pytest_chvm.host.virtiofsd import ServedShare
from pytest_chvm.model import SharedDir, SocketPairFd, Tap, VmConfig, VmHandle, VmStatus, mac_for

logger = logging.getLogger("pytest_chvm")

# In a snapshot's directory, beside the VMM's own: the memory where it is a file, and the console's log up to then.
MEMORY_FILE = "memory"
CONSOLE_FILE = "console.log"
# What a VM writes to its root disk: in its run directory, and in a snapshot's, where it is never written again.
ROOT_FILE = "root.qcow2"


@dataclass(frozen=True, slots=True)
class BootOptions:
    """What a boot has beside the VM's config.

    `lease`: where the caller has leased the VM's networks already. `console`: the guest is to have a virtio console, for the shell.
    `nonce`: what the ready line must have after the IP. `template_dir`: the memory is a file there, and so is what the VM writes to
    its root disk, so that a snapshot in that directory need not copy them. `snapshots`: below which snapshots of the VM will be.
    `restore_timeout_s`: how long a restore may take until the VM runs.
    """

    lease: Lease | None = None
    console: bool = False
    ready_marker: str = DEFAULT_MARKER
    nonce: str | None = None
    template_dir: Path | None = None
    snapshots: Path | None = None
    restore_timeout_s: float = 60.0


DEFAULT_OPTIONS = BootOptions()


class VmDriver(Protocol):
    """A VMM. Thread-safe; an operation that it does not have raises UnsupportedError."""

    vmm: str
    # How many bytes of a command's output may be on their way to us over the virtio console at once.
    console_piece: int

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

    def allow_reboot(self, handle: VmHandle, shares: Sequence[ServedShare]) -> tuple[VmHandle, list[ServedShare]]:
        """Let the next reboot of the guest be one, where it would otherwise be the VMM's end, or trouble.

        Returns the handle from then on, and who serves the shared dirs, `shares` until now.
        """

    def settle(self, handle: VmHandle) -> None:
        """Take what befell the guest so far for dealt with: it is up, and its next reboot is trouble again."""

    def run_state(self, handle: VmHandle) -> str | None:
        """Return in the VMM's words what the guest does where it does not run; None where it runs."""

    def snapshot(self, handle: VmHandle, directory: Path) -> None:
        """Save a paused VM's state and memory to a directory; disks are not saved."""

    def restore(self, config: VmConfig, directory: Path, options: BootOptions = DEFAULT_OPTIONS) -> VmHandle:
        """Start a VM from a snapshot's directory and return it running; it writes nothing there.

        `config` may differ from the snapshot's in names, logs, the other end of each NIC, and shared dirs, which are plugged in.
        """


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
    machine_id: str = field(default_factory=lambda: str(uuid.UUID(bytes=random_bytes(16), version=4)))
    memory: Memory | None = None
    # The directory of the snapshot that the VM begins with.
    restoring: Path | None = None
    snapshots: Path | None = None
    template_dir: Path | None = None

    def socket(self, name: str) -> Path:
        """Return where a socket of this VM's lives, short enough for any address."""
        return self.lease.directory / name

    def add_fd(self, fd: int) -> str:
        """Hand a descriptor over; returns the text that becomes its number in the VMM."""
        self.fds.append(fd)
        return f"{{fd{len(self.fds) - 1}}}"

    def add_listener(self, name: str) -> str:
        """Hand a listening UNIX socket over, which can be connected to from now on; returns the text for its number."""
        with Socket(socket.AF_UNIX) as listener:
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
    """A VMM's arguments: `machine` is what a person types to repeat it, `control` is for us to talk to it.

    `prints_console`: the serial console is its standard output. `event_log` is what it writes its events to.
    """

    machine: list[str]
    control: list[str]
    event_log: Path
    # What stands for a descriptor in a text for people: `fd={fd0}` -> `ifname=chvm1`.
    shown: dict[str, str] = field(default_factory=dict)
    prints_console: bool = False

    def for_people(self) -> tuple[str, ...]:
        """Return the arguments as a person would type them."""
        words = self.machine
        for fd, text in self.shown.items():
            words = [word.replace(fd, text) for word in words]
        return tuple(words)


def share_id(share: SharedDir) -> str:
    """Return what a VMM calls the device of a shared dir that was plugged in."""
    return f"fs-{share.tag}"


def binary_key(binary: Binary) -> list[str]:
    """Return what tells one build of a program from another, also where all files have one time, or a link leads to another."""
    return [binary.version, *file_key(binary.path)]


def file_key(path: Path) -> list[str]:
    """Return what tells a file from another that was put in its place, without reading it."""
    found = path.stat()
    place = os.path.realpath(path)
    return [place, *(str(value) for value in (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))]


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

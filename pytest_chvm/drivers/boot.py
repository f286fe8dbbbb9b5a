"""One boot: what its caller gives it, what it has ready when the command line is built, and the command line."""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from pytest_chvm.base.untouched import Socket, random_bytes
from pytest_chvm.drivers.memory import Memory
from pytest_chvm.guest.ready import DEFAULT_MARKER
from pytest_chvm.host.leases import Lease
from pytest_chvm.model import VmConfig

# In a snapshot's directory, beside the VMM's own: the memory where it is a file, and the console's log up to then.
MEMORY_FILE = "memory"
CONSOLE_FILE = "console.log"
# The time of the last message of the kernel's by then.
KERNEL_TIME_FILE = "kernel-time"
# What a VM writes to its root disk: in its run directory, and in a snapshot's, where it is never written again.
ROOT_FILE = "root.qcow2"
# In a run directory: where a debugger is listened for.
GDB_SOCKET = "gdb.sock"


@dataclass(frozen=True, slots=True)
class BootOptions:
    """What a boot has beside the VM's config.

    `lease`: the caller's, where it has leased the VM's networks already. `console`: the guest has a virtio console, for the shell.
    `nonce`: what the ready line must have after the IP. `template_dir`: the memory is a file there, and so is what the VM writes to
    its root disk, so that a snapshot in that directory need not copy them. `snapshots`: where snapshots of the VM will be.
    `restore_timeout_s`: how long a restore may take until the VM runs. `checked`: the caller has asked `preflight` already.
    `modules_disk`: an image with the modules of the guest's kernel, which is the last disk.
    """

    lease: Lease | None = None
    console: bool = False
    ready_marker: str = DEFAULT_MARKER
    nonce: str | None = None
    template_dir: Path | None = None
    snapshots: Path | None = None
    restore_timeout_s: float = 60.0
    checked: bool = False
    modules_disk: Path | None = None


DEFAULT_OPTIONS = BootOptions()


@dataclass
class Boot:
    """What a boot has ready when the command line is built; `fds` are given to the VMM and then closed."""

    config: VmConfig
    lease: Lease
    serial_log: Path
    options: BootOptions
    # Of each shared dir, in order.
    share_sockets: list[Path] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)
    taps_to_remove: list[str] = field(default_factory=list)
    machine_id: str = field(default_factory=lambda: str(uuid.UUID(bytes=random_bytes(16), version=4)))
    memory: Memory | None = None
    # The directory of the snapshot that the VM begins with.
    restoring: Path | None = None
    # A directory for what the guest writes to disks that go with it, elsewhere than in memory.
    scratch: Path | None = None

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


@dataclass(frozen=True)
class VmmCommand:
    """A VMM's arguments: `machine` is what a person would type to start the same VM, `control` adds the sockets for this package.

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

"""What a driver is.

A driver turns a `VmConfig` into a command line and speaks its VMM's control protocol. It never waits for the
guest, and never chooses what is started.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pytest_chvm.drivers.boot import DEFAULT_OPTIONS, BootOptions
from pytest_chvm.errors import VmError
from pytest_chvm.host.binaries import Binary
from pytest_chvm.host.virtiofsd import ServedShare
from pytest_chvm.model import SharedDir, VmConfig, VmHandle, VmStatus

logger = logging.getLogger("pytest_chvm")


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


def share_id(share: SharedDir) -> str:
    """Return what a VMM calls the device of a shared dir that was plugged in."""
    return f"fs-{share.tag}"

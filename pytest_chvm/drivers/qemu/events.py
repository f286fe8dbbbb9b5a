"""QEMU's events, written to a file from the start of the VM on: a second QMP monitor that nobody has to be connected to.

It is a "pipe" of QEMU's, which is two files. One is a FIFO with the one command that has events sent (QEMU's
docs/interop/qmp-spec.rst, capabilities negotiation), the other a plain file, to which they are written.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_chvm.drivers.boot import Boot
from pytest_chvm.drivers.events import EventReader
from pytest_chvm.errors import GuestPanicError, GuestRebootError, GuestShutdownError, VmError

NEGOTIATE = b'{"execute": "qmp_capabilities"}\n'
# The guest goes on after it has told of its panic: to save a crash dump, or to reboot.
PANIC_DEVICE = ("-device", "pvpanic-pci", "-action", "panic=none")
SHUTDOWNS: dict[str, tuple[type[VmError], str]] = {
    "guest-reset": (GuestRebootError, "the guest rebooted, and nobody asked it to: use vm.reboot() where it should"),
    "guest-shutdown": (GuestShutdownError, "the guest powered itself off"),
}


def event_arguments(boot: Boot) -> list[str]:
    """Return the arguments that have QEMU write its events to the VM's event log."""
    log = event_log(boot.lease.directory)
    # There before QEMU is, for whoever watches it.
    log.touch(mode=0o600)
    orders = log.with_suffix(".in")
    os.mkfifo(orders, 0o600)
    fd = os.open(orders, os.O_RDWR | os.O_CLOEXEC)
    # What is in a FIFO is lost when nobody has it open, and QEMU opens it in a moment.
    boot.add_fd(fd)
    os.write(fd, NEGOTIATE)
    path = os.fspath(log.with_suffix("")).replace(",", ",,")
    return ["-chardev", f"pipe,id=events,path={path}", "-mon", "chardev=events,mode=control"]


def event_log(directory: Path) -> Path:
    """Return the file that the events are in."""
    return directory / "events.out"


@dataclass
class QemuEvents(EventReader):
    """Reads what the event monitor writes; `stopped_by` is the error of a disk for which QEMU has paused the guest."""

    stopped_by: dict[str, Any] | None = None

    def judge(self, event: dict[str, Any]) -> None:
        """Take note of one event (QEMU's qapi/run-state.json, block-core.json)."""
        name, data = event.get("event"), event.get("data")
        data = data if isinstance(data, dict) else {}
        if name == "BLOCK_IO_ERROR" and data.get("action") == "stop":
            self.stopped_by = data
        elif name == "RESUME":
            self.stopped_by = None
        elif name in ("GUEST_PANICKED", "GUEST_CRASHLOADED"):
            self._note(GuestPanicError, "the guest's kernel panicked, as its panic device says")
        elif name == "RESET" and data.get("guest") and not self.expected_reboots:
            # One reboot may be several resets: none of them is counted until the guest is up.
            self._note(*SHUTDOWNS["guest-reset"])
        elif name == "SHUTDOWN" and (kind := SHUTDOWNS.get(str(data.get("reason")))):
            self._note(*kind)

    def _note(self, kind: type[VmError], what: str) -> None:
        if self.trouble is None:
            self.trouble = kind(f"VM {self.vm_name!r}: {what}", vm_name=self.vm_name)

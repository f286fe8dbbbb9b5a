"""Cloud Hypervisor's event monitor: what it says of the guest, read as it says it.

JSON objects separated by blank lines, each with `timestamp`, `source`, `event` and `properties`
(event_monitor/src/lib.rs). They are the VMM's own, but the guest decides how many there are: reading is bounded.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from pytest_chvm.errors import GuestPanicError, GuestRebootError, GuestShutdownError, VmError

logger = logging.getLogger("pytest_chvm")

# An event is a few hundred bytes; a longer one is not waited for.
LONGEST_EVENT = 1 << 16


@dataclass
class EventMonitor:
    """Reads one VM's events; `trouble` is what a test must be told of, once seen."""

    vm_name: str
    path: Path
    # Reboots that the test asked for and that have not come yet.
    expected_reboots: int = 0
    trouble: VmError | None = None
    # The devices that the guest has let go of, as the VMM calls them: a virtio device by its PCI device.
    removed: list[str] = field(default_factory=list)
    _booted: bool = False
    _offset: int = 0
    _pending: str = field(default="")

    def read(self) -> VmError | None:
        """Read what is new and return the first trouble there was, now or before."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                while data := file.read(LONGEST_EVENT):
                    self._offset += len(data)
                    self._take(self._pending + data.decode(errors="replace"))
        except FileNotFoundError:
            return self.trouble
        return self.trouble

    def _take(self, text: str) -> None:
        decoder = json.JSONDecoder()
        text = text.lstrip()
        while text:
            try:
                event, end = decoder.raw_decode(text)
            except (ValueError, RecursionError):
                if len(text) > LONGEST_EVENT:
                    logger.warning("%s: the event monitor says what is no event: %r", self.vm_name, text[:80])
                    text = ""
                break
            if isinstance(event, dict):
                self._judge(str(event.get("source")), str(event.get("event")))
                if event.get("event") == "device-removed" and isinstance(event.get("properties"), dict):
                    self.removed.append(str(event["properties"].get("id")))
            text = text[end:].lstrip()
        self._pending = text

    def _judge(self, source: str, event: str) -> None:
        logger.debug("%s: event %s %s", self.vm_name, source, event)
        if (source, event) in (("vm", "booted"), ("vm", "restored")):
            self._booted = True
        elif (source, event) == ("vm", "shutdown") and not self._booted:
            # Of a boot that failed, which the VMM's own end tells better.
            return
        elif (source, event) == ("vm", "rebooting") and self.expected_reboots:
            self.expected_reboots -= 1
        elif self.trouble is None and (kind := TROUBLES.get((source, event))):
            self.trouble = kind[0](f"VM {self.vm_name!r}: {kind[1]}", vm_name=self.vm_name)


TROUBLES: dict[tuple[str, str], tuple[type[VmError], str]] = {
    ("guest", "panic"): (GuestPanicError, "the guest's kernel panicked, as its panic device says"),
    ("vm", "rebooting"): (GuestRebootError, "the guest rebooted, and nobody asked it to: use vm.reboot() where it should"),
    ("vm", "shutdown"): (GuestShutdownError, "the guest powered itself off"),
}


def open_event_log(directory: Path) -> int:
    """Return a descriptor for the VMM to write its events to, a file of `directory`."""
    return os.open(event_log(directory), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def event_log(directory: Path) -> Path:
    """Return the file that the events are in."""
    return directory / "events.json"

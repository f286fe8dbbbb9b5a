"""Reading what Cloud Hypervisor's event monitor reports of the guest.

JSON objects separated by blank lines, each with `timestamp`, `source`, `event` and `properties`
(event_monitor/src/lib.rs).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pytest_chvm.drivers.events import LONGEST_EVENT as LONGEST_EVENT
from pytest_chvm.drivers.events import EventReader
from pytest_chvm.errors import GuestPanicError, GuestRebootError, GuestShutdownError, VmError


@dataclass
class EventMonitor(EventReader):
    """Reads what `--event-monitor` writes."""

    # The devices that the guest has let go of, as the VMM calls them: a virtio device by its PCI device.
    removed: list[str] = field(default_factory=list)
    _booted: bool = False

    def judge(self, event: dict[str, Any]) -> None:
        """Take note of one event."""
        what = str(event.get("source")), str(event.get("event"))
        if what[1] == "device-removed" and isinstance(event.get("properties"), dict):
            self.removed.append(str(event["properties"].get("id")))
        if what in (("vm", "booted"), ("vm", "restored")):
            self._booted = True
        elif what == ("vm", "shutdown") and not self._booted:
            # A failed boot: the end of the VMM, which follows, says more.
            return
        elif what == ("vm", "rebooting") and self.expected_reboots:
            self.expected_reboots -= 1
        elif self.trouble is None and (kind := TROUBLES.get(what)):
            self.trouble = kind[0](f"VM {self.vm_name!r}: {kind[1]}", vm_name=self.vm_name)


TROUBLES: dict[tuple[str, str], tuple[type[VmError], str]] = {
    ("guest", "panic"): (GuestPanicError, "the guest's kernel panicked, as its panic device says"),
    ("vm", "rebooting"): (GuestRebootError, "the guest rebooted, and nobody asked it to: use vm.reboot() where it should"),
    ("vm", "shutdown"): (GuestShutdownError, "the guest powered itself off"),
}

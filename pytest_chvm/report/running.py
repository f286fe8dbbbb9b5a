"""Which VMs there are of this user's test runs, from their records and event logs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_chvm.base.untouched import monotonic_s
from pytest_chvm.host.keeper import records, remains
from pytest_chvm.host.registry import owners, shown
from pytest_chvm.machine.events import (
    COMMAND,
    ENDED,
    PANIC,
    PAUSED,
    READY,
    REBOOT,
    RESUMED,
    SPAWNED,
    Event,
    last_of,
    read_events,
    ready_after_s,
)

# What a VM is after the last of these events; what is not here is booting.
STATES = {READY: "ready", PAUSED: "paused", PANIC: "panicked", ENDED: "ended"}


@dataclass(frozen=True, slots=True, kw_only=True)
class VmEntry:
    """A VM in the records: `age_s` seconds since its VMM started, `memory_mb` MiB; None is what is not known (yet).

    `state` is "waiting" (for memory, or its VMM to start), "booting", "ready", "paused", "panicked", "ended", or "abandoned":
    nobody is there who would clean up. `owner_pid` is the test process. `ready_after_s`: how long its first boot took.
    """

    name: str
    state: str
    test: str | None
    worker: str | None
    age_s: float | None
    memory_mb: int | None
    cpus: int | None
    ip: str | None
    console: str | None
    vmm: str | None
    pid: int | None
    owner_pid: int
    directory: str
    ready_after_s: float | None
    last_command: str | None


def running_vms() -> tuple[list[VmEntry], list[str]]:
    """Return the VMs in the records of this user's processes, the oldest first, and what could not be understood, in words."""
    found: list[VmEntry] = []
    problems: list[str] = []
    for directory, owner in owners(problems):
        same_boot = owner["boot_id"] == remains.boot_id()
        abandoned = records.is_abandoned(directory, owner)
        for lease in records.leases_of(directory):
            try:
                vm = records.read_lease(lease).get("vm", {})
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                problems.append(f"{shown(lease)} is not understood: {shown(str(error))}")
                continue
            # A network has a lease too.
            if isinstance(vm.get("name"), str):
                found.append(_entry(vm, owner["pid"], lease, same_boot=same_boot, abandoned=abandoned))
    return sorted(found, key=lambda vm: -(vm.age_s or 0)), problems


def _entry(vm: dict[str, Any], owner_pid: int, lease: str, *, same_boot: bool, abandoned: bool) -> VmEntry:
    events = _events_of(vm)
    spawned, ready, command = (_details(last_of(events, kind)) for kind in (SPAWNED, READY, COMMAND))
    pid, ticks = _number(spawned.get("pid")), _number(spawned.get("start_time_ticks"))
    runs = same_boot and pid is not None and ticks is not None and remains.start_time_ticks(pid) == ticks
    start = last_of(events, SPAWNED)
    return VmEntry(
        name=shown(vm["name"]),
        state="abandoned" if abandoned else "waiting" if pid is None else _state(events) if runs else "ended",
        test=_text(vm.get("test")),
        worker=_text(vm.get("worker")),
        age_s=max(0.0, monotonic_s() - start.at_s) if runs and start is not None else None,
        memory_mb=_number(vm.get("memory_mb")),
        cpus=_number(vm.get("cpus")),
        ip=_text(ready.get("ip")),
        console=_text(spawned.get("console")),
        vmm=_text(vm.get("vmm")),
        pid=pid,
        owner_pid=owner_pid,
        directory=shown(lease),
        ready_after_s=ready_after_s(events),
        last_command=_text(command.get("command")),
    )


def _events_of(vm: dict[str, Any]) -> tuple[Event, ...]:
    place = vm.get("events")
    if not isinstance(place, str):
        return ()
    try:
        return read_events(Path(place))
    except (OSError, ValueError):
        # It is about to be made; or its directory is gone, or somebody else's; or it is no path.
        return ()


def _state(events: tuple[Event, ...]) -> str:
    last = last_of(events, SPAWNED, REBOOT, *STATES, RESUMED)
    if last and last.kind == RESUMED:
        # A guest can be paused while it boots.
        last = last_of((event for event in events if event.kind != PAUSED), SPAWNED, REBOOT, *STATES)
    return STATES.get(last.kind, "booting") if last else "booting"


def _details(event: Event | None) -> Mapping[str, object]:
    return event.details if event else {}


def _number(value: object) -> int | None:
    return value if type(value) is int and 0 < value < 1 << 63 else None


def _text(value: object) -> str | None:
    return shown(value) if isinstance(value, str) else None

"""What `chvm ps` says of VMs, from their records and event logs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_chvm.host.host import Host
from pytest_chvm.host.keeper import remains
from pytest_chvm.host.leases import Lease
from pytest_chvm.machine.events import ENDED, PAUSED, READY, REBOOT, RESUMED, SPAWNED, EventLog
from pytest_chvm.report.running import running_vms


@pytest.fixture
def described(tmp_path: Path) -> Iterator[Callable[[str], EventLog]]:
    """Records a VM, whose VMM is this process, and returns its event log."""
    host, logs = Host(), []

    def describe(name: str) -> EventLog:
        path = tmp_path / f"{name}.events.jsonl"
        Lease(host).describe(name=name, events=os.fspath(path))
        log = EventLog(path)
        logs.append(log)
        log.add(SPAWNED, pid=os.getpid(), start_time_ticks=remains.start_time_ticks(os.getpid()))
        return log

    yield describe
    for log in logs:
        log.close()
    assert host.close() == []


@pytest.mark.parametrize(
    ("kinds", "state"),
    [
        ([], "booting"),
        ([PAUSED, RESUMED], "booting"),
        ([READY], "ready"),
        ([READY, PAUSED], "paused"),
        ([READY, PAUSED, RESUMED], "ready"),
        ([READY, REBOOT, PAUSED, RESUMED], "booting"),
        ([READY, PAUSED, ENDED], "ended"),
    ],
)
def test_a_vm_s_state_is_what_has_happened_last(described, kinds: list[str], state: str) -> None:
    log = described("of-this-test")
    for kind in kinds:
        log.add(kind)
    vms, _problems = running_vms()
    assert [vm.state for vm in vms if vm.name == "of-this-test" and vm.owner_pid == os.getpid()] == [state]


@pytest.mark.parametrize("events", ["\ud800", "a\0b", "/proc/none", "/dev/zero", 7])
def test_an_event_log_that_can_be_none_hides_no_vm(described, events: object) -> None:
    host = Host()
    described("good").add(READY, ip="\ud800")
    Lease(host).describe(name="bad", events=events)
    vms, _problems = running_vms()
    assert {vm.name: vm.state for vm in vms if vm.owner_pid == os.getpid()} == {"good": "ready", "bad": "waiting"}
    assert host.close() == []

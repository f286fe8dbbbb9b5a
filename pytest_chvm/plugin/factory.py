"""`VmFactory`: the value of the fixtures `chvm_vm` and `chvm_vm_factory`."""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from pytest_chvm.base.deadline import Deadline
from pytest_chvm.base.steps import Step, take_all
from pytest_chvm.errors import StopFailedError
from pytest_chvm.host.host import Host
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.locks import held_under
from pytest_chvm.host.networks.isolated import LeasedNetwork, lease_network
from pytest_chvm.host.networks.subnets import parse_pool
from pytest_chvm.machine.launcher import launch
from pytest_chvm.machine.vm import Snapshot, Vm
from pytest_chvm.model import NAME_PATTERN, Network, VmConfig, check_argument_names
from pytest_chvm.model.arguments import VmArguments
from pytest_chvm.settings import Settings

# For all VMs and networks of one fixture together: they are ended at the same time.
TEARDOWN_S = 3.0


class VmFactory:
    """Called like `launch`; ends all its VMs and networks when it is closed.

    `defaults` are arguments of every call (a marker's); logs go below `log_dir`. VMs without a name get `name` and a number. No
    boot is waited for longer than `longest_boot_s`, whoever asks for more. `at_end_of_caller` has something done at the end of the
    fixture or test that runs. `check` is called with each VM that is ready. Only the process that made it ends anything, not one
    that was forked from that.
    """

    def __init__(
        self,
        settings: Settings,
        host: Host,
        *,
        name: str,
        namespace: str,
        log_dir: Callable[[], Path],
        defaults: dict[str, Any] | None = None,
        longest_boot_s: float | None = None,
        at_end_of_caller: Callable[[Callable[[], None]], None] | None = None,
        test: str | None = None,
        check: Callable[[Vm], None] | None = None,
    ) -> None:
        self.settings = settings
        self._host = host
        self._test = test or name
        self._check = check
        self._leases: list[Lease] = []
        self.vms: list[Vm] = []
        self._snapshots: list[Snapshot] = []
        self._at_end_of_caller = at_end_of_caller
        self._owner_pid = os.getpid()
        self._logs: set[Path] = set()
        self._networks: list[LeasedNetwork] = []
        self._name = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")[:50] or "vm"
        self._namespace = namespace
        self._log_dir = log_dir
        self.defaults = defaults or {}
        self._longest_boot_s = longest_boot_s
        self._count = itertools.count(1)
        self.closed = False

    def __call__(self, config: VmConfig | None = None, *, wait: bool | None = None, **arguments: Unpack[VmArguments]) -> Vm:
        """Boot a VM; see `launch`. With `wait=False` it is returned at once (default: what the marker says, else True)."""
        check_argument_names(arguments)
        number = next(self._count)
        name = self._name if number == 1 else f"{self._name}-{number}"
        given: dict[str, Any] = {"name": name, "namespace": self._namespace, **self.defaults}
        given |= {**(config.given() if config else {}), **arguments}
        if wait is not None:
            given["wait"] = wait
        # VmConfig refuses invalid names.
        if given.get("serial_log") is None and isinstance(given["name"], str) and NAME_PATTERN.fullmatch(given["name"]):
            given["serial_log"] = self.new_log(given["name"])
        settings = self.settings.with_arguments({"boot_timeout": given.pop("boot_timeout", None)})
        vm = launch(settings=settings, owner=self, host=self._host, longest_boot_s=self._longest_boot_s, **given)
        if self._check is not None and given.get("wait", True) and given.get("gdb") != "wait":
            self._check(vm)
        return vm

    def new_log(self, name: str) -> Path:
        """Return where the serial log of a VM goes; an earlier one's of that name is left as it is."""
        directory = self._log_dir()
        paths = (directory / f"{name}{f'-{number}' if number > 1 else ''}.serial.log" for number in itertools.count(1))
        log = next(path for path in paths if path not in self._logs)
        self._logs.add(log)
        return log

    def add_vm(self, vm: Vm) -> None:
        """End this VM with the others."""
        self.vms.append(vm)

    def add_snapshot(self, snapshot: Snapshot) -> None:
        """Remove this snapshot after the VMs."""
        self._snapshots.append(snapshot)

    def end_with_caller(self, vm: Vm) -> None:
        """End this VM at the end of the fixture that is being made, or of the test that runs, if that is sooner."""
        if self._at_end_of_caller is not None:
            self._at_end_of_caller(vm.close)

    def forget_ended(self) -> None:
        """Let go of the VMs that have ended."""
        self.vms[:] = [vm for vm in self.vms if not vm.closed]

    def network(self, name: str | None = None) -> Network:
        """Make an isolated network for several VMs; see `host.networks.isolated.lease_network`."""
        leased = lease_network(self._host, parse_pool(self.settings.subnet_pool), name, self.add_lease)
        self._networks.append(leased)
        return leased.network

    def add_lease(self, lease: Lease) -> None:
        """Remember the record of what a VM or network, which is not there yet, has on the host."""
        self._leases.append(lease)
        lease.describe(test=self._test, worker=self._namespace)

    def close(self) -> None:
        """End all VMs, at once, then the networks; raises StopFailedError with everything that is left."""
        if os.getpid() != self._owner_pid:
            return
        self.closed = True
        ends = [_End(vm) for vm in self.vms[1:]]
        deadline = Deadline.after(TEARDOWN_S)
        steps: list[Step] = [end.start for end in ends]
        steps += [vm.close for vm in self.vms[:1]]
        steps += [partial(end.failures, deadline) for end in ends]
        steps += [*(snapshot.close for snapshot in self._snapshots), *(network.close for network in self._networks)]
        if failures := take_all(steps):
            raise StopFailedError("; ".join(failures))

    def end_what_is_left(self) -> list[str]:
        """End what `close` should have ended and has not, since a teardown can be interrupted anywhere; returns that in words."""
        left: list[str] = []
        for lease in self._leases if os.getpid() == self._owner_pid else ():
            locks = held_under(lease)
            left += [*lease.left(), *(f"lock {lock.name}" for lock in locks)]
            for lock in locks:
                lock.release()
            left += [f"it cannot be removed: {failure}" for failure in lease.release(search=True)]
        return left


class _End(threading.Thread):
    """Ends one VM in a thread, while others end."""

    def __init__(self, vm: Vm) -> None:
        super().__init__(daemon=True)
        self._vm = vm
        self._failures: list[str] = []

    def run(self) -> None:
        """End it."""
        self._failures += take_all([self._vm.close])

    def failures(self, deadline: Deadline) -> list[str]:
        """Wait for the end; returns what went wrong, in words."""
        self.join(deadline.remaining_s)
        late = [f"VM {self._vm.name!r} is still being ended after {deadline.total_s:g} s"] if self.is_alive() else []
        return self._failures + late

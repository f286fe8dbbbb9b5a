"""The end of a VM: once, whoever asks for it, and from however many threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from pytest_chvm.base.deadline import Deadline, checked_timeout
from pytest_chvm.base.steps import Step, take_all
from pytest_chvm.errors import StopFailedError, UnsupportedError, VmError, VmIOError
from pytest_chvm.machine.health import ends_with
from pytest_chvm.machine.machine import Machine
from pytest_chvm.model import VmHandle


class Ending:
    """Ends one VM and gives back what it had; a thread that asks for it while another is at it waits for that one and returns.

    `rest` returns the steps after the end of the VMM.
    """

    def __init__(self, machine: Machine, rest: Callable[[], list[Step]]) -> None:
        self.closed = False
        self._machine = machine
        self._rest = rest
        self._owner_pid = os.getpid()
        self._closing = False
        self._removed = False
        # Reentrant: a signal's handler may end a VM that its thread is just ending, and returns at once then.
        self._lock = threading.RLock()

    def shutdown(self, timeout: float | None) -> None:
        """Have the guest power off and wait for it; see `Vm.shutdown`."""
        self._require_owner()
        deadline = Deadline.after(checked_timeout(timeout))
        try:
            self._power_off(deadline)
        except VmError:
            # Where the test has ended it, or another thread does so meanwhile, nothing is left to ask for.
            if not self._machine.ended:
                raise
        self.end(self._machine.driver.kill, "shutdown()")

    def _power_off(self, deadline: Deadline) -> None:
        machine = self._machine
        machine.check_alive()
        try:
            machine.channel.tell("sync; poweroff -f || poweroff", deadline.remaining_s)
        except (VmIOError, UnsupportedError):
            machine.driver.power_button(machine.handle)
        if not machine.health.wait_ended(deadline):
            raise StopFailedError(
                f"VM {machine.name!r} did not power off within {deadline.total_s:g} s; its console "
                f"{ends_with(machine.handle.serial_log)}\nstop() ends the VMM without asking the guest.",
                vm_name=machine.name,
            )

    def end(self, end: Callable[[VmHandle], None], how: str) -> None:
        """End the VMM with a method of its driver's, then all that the VM had; `how` is what the test has called."""
        self._require_owner()
        with self._lock:
            if not self._machine.ended:
                try:
                    self._end(end, how)
                finally:
                    self.close()

    def close(self) -> None:
        """End it where it still runs and give back all it had; see `Vm.close`."""
        if os.getpid() != self._owner_pid:
            return
        with self._lock:
            if self._closing:
                return
            self._closing = True
            kill = self._machine.driver.kill
            ending = [] if self._removed else [lambda: self._end(kill, "close()")]
            try:
                failures = take_all([*ending, *self._rest()])
            finally:
                self.closed = True
        if failures:
            raise StopFailedError("; ".join(failures), vm_name=self._machine.name)

    def _end(self, end: Callable[[VmHandle], None], how: str) -> None:
        """Take each step whatever becomes of those before it: the test may be interrupted in any of them."""
        machine = self._machine
        try:
            machine.log.add_ended(how)
            # The log may go with the run directory.
            machine.last_console = machine.console_text()
            machine.splats.collect(trusts_console=True)
        finally:
            machine.health.ended = True
            try:
                machine.channel.close()
            finally:
                try:
                    end(machine.handle)
                except VmError:
                    self._removed = True
                    raise
                self._removed = True

    def _require_owner(self) -> None:
        if os.getpid() != self._owner_pid:
            raise UnsupportedError(
                f"VM {self._machine.name!r} is process {self._owner_pid}'s, and this process ({os.getpid()}) was forked from it: "
                "end the VM there, or as another process does, by a driver's stop(vm.handle) or kill(vm.handle)",
                vm_name=self._machine.name,
            )

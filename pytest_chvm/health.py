"""What has become of a VM: watching its console, its VMM and its sidecars, and saying in words what happened."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pytest_chvm.deadline import Deadline, wait_readable
from pytest_chvm.drivers.base import VmDriver
from pytest_chvm.errors import BootFailedError, GuestPanicError, HypervisorError, VmError, VmIOError
from pytest_chvm.guest.kernel_image import why_silent
from pytest_chvm.guest.ready import PanicScanner, ReadyScanner
from pytest_chvm.host.processes import keeper
from pytest_chvm.host.remains import start_time_ticks
from pytest_chvm.host.watch import FileWatch
from pytest_chvm.model import ProcessIdentity, VmConfig, VmHandle
from pytest_chvm.text import last_lines

Found = TypeVar("Found")
EMPTY = "is empty."
VMM_END_S = 0.5
VMM_OUT_S = 2.0


class Health:
    """Of one VM, until `close`; `handle` returns its handle as it is now."""

    def __init__(self, config: VmConfig, handle: Callable[[], VmHandle], driver: VmDriver, *, nonce_required: bool) -> None:
        first = handle()
        assert first.process is not None
        self.process = first.process
        self.ready = ReadyScanner(first.serial_log, first.ready_marker, first.nonce, nonce_required)
        self._config = config
        self._handle = handle
        self._driver = driver
        self._panic = PanicScanner(first.serial_log)
        events = driver.event_log(first)
        self._watch = FileWatch(first.serial_log, *([events] if events else []))
        self._pidfds: dict[int, int] = {}

    def close(self) -> None:
        """Let go of what is watched."""
        self._watch.__exit__(None, None, None)
        while self._pidfds:
            os.close(self._pidfds.popitem()[1])

    def has_ended(self) -> bool:
        """Tell whether the VMM is gone."""
        return has_ended(self.process)

    def check(self) -> None:
        """Raise what has become of the guest if it is not well: a panic, an event, the end of the VMM or of a sidecar."""
        self._watch.clear()
        self._raise_trouble()

    def _raise_trouble(self) -> None:
        name, log = self._config.name, self._handle().serial_log
        if panic := self._panic.scan():
            raise GuestPanicError(
                f"VM {name!r}: the guest's kernel gave up: {panic}. Its console {log} {ends_with(log)}", vm_name=name
            )
        if trouble := self._driver.trouble(self._handle()):
            raise trouble
        if self.has_ended():
            kind = HypervisorError if self.ready.scan() else BootFailedError
            raise kind(self._why_ended(), vm_name=name)
        self._check_sidecars()

    def check_ending(self) -> None:
        """Raise what has become of a VMM that is on its way out, after at most two seconds of it."""
        self.wait_ended(Deadline.after(VMM_OUT_S))
        self.check()

    def _check_sidecars(self) -> None:
        sidecars, shares = self._handle().sidecars, self._config.shared_dirs
        # After a reboot or a hotplug there are more, and which belongs to which share is not known here.
        for index, (sidecar, share) in enumerate(zip(sidecars, shares, strict=False) if len(sidecars) == len(shares) else ()):
            if has_ended(sidecar):
                # It ends with its VMM too, and sees that end a moment before we can.
                if self.wait_ended(Deadline.after(VMM_END_S)):
                    self._raise_trouble()
                raise HypervisorError(
                    f"VM {self._config.name!r}: virtiofsd (pid {sidecar.pid}) for shared dir {share.tag!r} ({share.host_path}) "
                    f"{_how(sidecar)} while the VM runs; {self._sidecar_log(index)}",
                    vm_name=self._config.name,
                )

    def _sidecar_log(self, index: int) -> str:
        run_dir = self._handle().run_dir
        return f"its log {ends_with(run_dir / f'fs{index}.log')}" if run_dir else ""

    def _why_ended(self) -> str:
        handle = self._handle()
        when = "after it was ready" if self.ready.ip else "before it was ready"
        hint = self._driver.failure_hint()
        return (
            f"VM {handle.name!r}: its VMM (pid {self.process.pid}) {_how(self.process)}, {when}. "
            f"Its log {handle.vmm_log} {ends_with(handle.vmm_log)}\n"
            f"The guest's console {console_ends_with(handle.serial_log, self._config)}\n"
            f"To repeat it: {shlex.join(handle.command)}{f'{chr(10)}{hint}' if hint else ''}"
        )

    def wake_fds(self) -> list[int]:
        """Return the descriptors of which one is readable when `check` has something new to look at."""
        for process in (self.process, *self._handle().sidecars):
            if process.pid not in self._pidfds:
                try:
                    self._pidfds[process.pid] = os.pidfd_open(process.pid)
                except ProcessLookupError:
                    self._raise_trouble()
        gone = [pid for pid, fd in self._pidfds.items() if pid != self.process.pid and wait_readable([fd], Deadline.after(0))]
        if gone:
            # A sidecar that was let go of, or this would have raised: it must not wake again.
            self._raise_trouble()
        return [self._watch.fileno(), *(fd for pid, fd in self._pidfds.items() if pid not in gone)]

    def wait_for(self, look: Callable[[], Found | None], deadline: Deadline, gave_up: Callable[[], VmError]) -> Found:
        """Block until `look` finds something on the console; raises what `check` does, and `gave_up()` at the deadline."""
        while True:
            # Before the look, and never between it and the wait: what is written in between must wake.
            self._watch.clear()
            if (found := look()) is not None or (self.has_ended() and (found := look()) is not None):
                return found
            self._raise_trouble()
            if deadline.expired:
                raise gave_up()
            wait_readable(self.wake_fds(), deadline)

    def wait_ended(self, deadline: Deadline) -> bool:
        """Block until the VMM is gone; tells whether it is."""
        while not self.has_ended():
            if deadline.expired:
                return False
            self._watch.wait(deadline, self.process.pid)
        return True


def has_ended(process: ProcessIdentity) -> bool:
    """Tell whether a process is gone."""
    return start_time_ticks(process.pid) != process.start_time_ticks


def _how(process: ProcessIdentity) -> str:
    try:
        code = keeper().returncode(process)
    except VmIOError as error:
        return f"ended ({error})"
    return f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"


def console_ends_with(log: Path, config: VmConfig) -> str:
    """Return a guest's last words for a message, or what may be the matter where there are none."""
    words = ends_with(log)
    return f"{words} {why_silent(config.cmdline)}" if words == EMPTY else words


def ends_with(log: Path) -> str:
    """Return a log's last lines for a message, cleaned and bounded."""
    lines = last_lines(log)
    return f"ends with:\n{lines}" if lines else EMPTY

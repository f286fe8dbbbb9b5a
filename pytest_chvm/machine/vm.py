"""`Vm`, and `Snapshot`, one that was saved: what a test holds."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pytest_chvm.base.deadline import Deadline, checked_timeout
from pytest_chvm.base.untouched import Socket
from pytest_chvm.drivers.base import logger
from pytest_chvm.errors import GuestCommandError, InvalidConfigError, VmIOError
from pytest_chvm.guest import renewal
from pytest_chvm.machine import debugger, hotplug, starts
from pytest_chvm.machine.commands import GuestCommands
from pytest_chvm.machine.device import Device
from pytest_chvm.machine.ending import Ending
from pytest_chvm.machine.events import CLONE, PAUSED, RESUMED, SNAPSHOT, Event
from pytest_chvm.machine.health import ends_with
from pytest_chvm.machine.machine import RUN_TIMEOUT_S, Machine, Origin
from pytest_chvm.machine.ports import Ports
from pytest_chvm.machine.starts import ExpectedSplat
from pytest_chvm.model import SharedDir, Tap, VmConfig, VmHandle, VmState, VmStatus, as_path, check_port

SHUTDOWN_TIMEOUT_S = 30.0
# The one above is anybody's (vsock(7), VMADDR_PORT_ANY).
HIGHEST_VSOCK_PORT = (1 << 32) - 2


class Vm(GuestCommands):
    """A virtual machine of a test's. Made by `launch` and `chvm_vm`; a context manager that ends it."""

    def __init__(self, machine: Machine, *, snapshot: Callable[[Machine], Snapshot], release: Callable[[], list[str]]) -> None:
        self._machine = machine
        self._ports = Ports(machine)
        self._snapshot = snapshot
        self._ending = Ending(machine, lambda: [*self._closing_ssh(), *self._ports.closing(), machine.close, release])

    def __repr__(self) -> str:
        return f"<Vm {self.name!r} {self.handle.vmm} pid {self.pid}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether it has ended and given back all it had."""
        return self._ending.closed

    @property
    def machine(self) -> Machine:
        """What this package's own rooms work on; nothing that a test needs."""
        return self._machine

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.config.name

    @property
    def config(self) -> VmConfig:
        """All that it was made of."""
        return self._machine.config

    @property
    def handle(self) -> VmHandle:
        """What is needed to find it, also from another process."""
        return self._machine.handle

    @property
    def origin(self) -> Origin:
        """How it came to be: booted, and why, or a clone."""
        return self._machine.origin

    @property
    def pid(self) -> int:
        """The VMM's process id."""
        return self._machine.health.process.pid

    @property
    def ip(self) -> str:
        """The guest's address, as its ready line said; raises VmIOError before that."""
        return self._machine.ip

    @property
    def status(self) -> VmStatus:
        """The VM's state and IP, looked up now."""
        machine = self._machine
        if machine.ended:
            return VmStatus(VmState.STOPPED)
        found = machine.driver.state(machine.handle)
        if found.state is VmState.STOPPED:
            machine.health.told = True
        return found

    @property
    def serial_log(self) -> Path:
        """The file with what the guest wrote to its serial console."""
        return self.handle.serial_log

    @property
    def vmm_log(self) -> Path:
        """The file with the VMM's own output."""
        return self.handle.vmm_log

    @property
    def console(self) -> str:
        """What the guest has written to its serial console so far, undecodable bytes replaced (the last 16 MiB)."""
        return self._machine.console_text()

    @property
    def events(self) -> tuple[Event, ...]:
        """What has happened to the VM so far, in order, with times; see `pytest_chvm.machine.events` for the kinds.

        Of more than 10 000 events the first 100 and the latest are kept.
        """
        return self._machine.log.events

    def wait_ready(self, timeout: float | None = None) -> Self:
        """Block until the guest has printed its ready marker; returns the VM.

        `timeout` is seconds from now; without it the boot's own deadline counts. Raises BootFailedError (EarlyGuestPanicError for a
        panic) as soon as the VMM ends or the guest's kernel gives up, and at the deadline.
        """
        starts.wait_ready(self._machine, timeout)
        return self

    def wait_for_console(self, pattern: str | re.Pattern[str], timeout: float | None = RUN_TIMEOUT_S) -> re.Match[str]:
        """Block until the serial console has text that matches, since the VM's start; returns the match.

        A match may span many lines, of what came within the last 64 KiB. `timeout` is seconds (None: no limit). Raises VmIOError
        after it, and at once when the VMM ends or the guest panics without a match.
        """
        from pytest_chvm.guest.search import ConsoleSearch

        search = ConsoleSearch(self.serial_log, re.compile(pattern))
        deadline = Deadline.after(checked_timeout(timeout))

        def no_match() -> VmIOError:
            return VmIOError(
                f"VM {self.name!r}: {search.pattern.pattern!r} did not appear on the console within {deadline.total_s:g} s; it "
                f"{ends_with(self.serial_log)}",
                vm_name=self.name,
            )

        last_console = self._machine.last_console
        if last_console is not None and (found := search.add(last_console)):
            return found
        return self._machine.health.wait_for(search.scan, deadline, no_match)

    def expect_panic(self, timeout: float = RUN_TIMEOUT_S) -> AbstractContextManager[None]:
        """Expect the guest's kernel to panic in the block, or within `timeout` seconds of its end; it may reboot for it.

        The panic is no error then, neither in the block, which ends with the call that notices it, nor at the end of the test.
        Afterwards `wait_ready()` blocks until the guest has started again, where it does. Raises VmIOError where it does not panic.
        """
        return starts.expect_panic(self._machine, timeout)

    def expect_splat(self, pattern: str | re.Pattern[str], timeout: float = RUN_TIMEOUT_S) -> AbstractContextManager[ExpectedSplat]:
        """Expect the guest's kernel to report something wrong with itself in the block, or within `timeout` seconds of its end.

        `pattern` is searched for in the whole report, a WARNING or a KASAN report for instance, which is no error then, and is the
        `splat` of what the block is given. Raises VmIOError where none matches; one that kills the guest is a matter of
        `expect_panic`.
        """
        return starts.expect_splat(self._machine, re.compile(pattern), timeout)

    def address(self, port: int) -> tuple[str, int]:
        """Return a host and port reachable from the test that lead to a TCP port of the guest's.

        On a TAP that is the guest's own address; in user mode QEMU forwards a port of the host's loopback; in a network namespace a
        relay of ours does. Raises UnsupportedError for a VM without a network.
        """
        return self._ports.address(port)

    @cached_property
    def testinfra(self) -> Any:
        """The VM as a `testinfra.host.Host`, without a network too; MissingRequirementError where that is missing.

        Typed as anything, since that one's types know nothing of its modules.
        """
        from pytest_chvm.machine.testinfra import testinfra_host

        return testinfra_host(self, self.name)

    def open_channel(self, name: str) -> socket.socket:
        """Return a connection to one of the config's channels; raises InvalidConfigError for another name."""
        if name not in self.config.channels:
            raise InvalidConfigError(f"VM {self.name!r} has no channel {name!r}: name it in channels=[...]", vm_name=self.name)
        return Socket(fileno=self._machine.driver.open_channel(self._machine.handle, name))

    def info(self) -> dict[str, object]:
        """Return what the VMM says of the VM, in its own words."""
        return self._machine.driver.info(self._machine.handle)

    def counters(self) -> dict[str, object]:
        """Return what the VMM has counted of each device, in its own words."""
        return self._machine.driver.counters(self._machine.handle)

    def add_disk(self, image: str | os.PathLike[str], *, read_only: bool = False) -> Device:
        """Plug a disk in; the VM must have been booted with `hotplug=True`."""
        return hotplug.add_disk(self._machine, as_path("image", image), read_only=read_only)

    def add_network(self, tap: Tap | None = None) -> Device:
        """Plug a NIC in that is attached to a TAP (default: one of its own); the VM must have been booted with `hotplug=True`."""
        return hotplug.add_network(self._machine, tap or Tap())

    def add_shared_dir(self, tag: str, host_path: str | os.PathLike[str], *, read_only: bool = False) -> Device:
        """Plug a shared dir in; the guest mounts it itself. The VM must have been booted with `hotplug=True`."""
        return hotplug.add_shared_dir(self._machine, SharedDir(tag, as_path("host_path", host_path), read_only))

    def remove(self, device: Device) -> None:
        """Unplug a device that was plugged in."""
        hotplug.remove(self._machine, device)

    def dump_memory(self, path: str | os.PathLike[str]) -> Path:
        """Write the guest's memory to an ELF core that `crash` and drgn open, also of one that is paused or has panicked.

        The guest stands still meanwhile. Returns the path; a file that is there is replaced. What opens it looks for the kernel's
        description of itself (VMCOREINFO), which QEMU has of a kernel with CONFIG_FW_CFG_SYSFS. Raises UnsupportedError where the
        VMM cannot, VmIOError where the file cannot be written.
        """
        return debugger.dump_memory(self._machine, as_path("path", path))

    @property
    def gdb_command(self) -> list[str]:
        """The command that attaches gdb to a VM with `gdb`: with the kernel's `vmlinux` where one with debug information is known.

        Raises UnsupportedError for another VM.
        """
        return debugger.gdb_command(self._machine)

    def resize(self, *, cpus: int | None = None, memory_mb: int | None = None) -> None:
        """Give the VM another number of processors or MiB of memory, up to `max_cpus` and `max_memory_mb` of its config.

        Whether the guest takes them is its kernel's affair; one with udev or the built-in one brings new processors online.
        """
        self._machine.resized = True
        self._machine.driver.resize(self._machine.handle, cpus=cpus, memory_mb=memory_mb)

    def vsock(self, port: int) -> socket.socket:
        """Return a stream connected to a vsock port of the guest's; raises VmIOError where nothing listens there."""
        check_port(port, HIGHEST_VSOCK_PORT, self.name)
        return self._machine.driver.open_vsock(self._machine.handle, port)

    def listen_vsock(self, port: int) -> socket.socket:
        """Return a listener that the guest reaches at a vsock port of CID 2, the host."""
        check_port(port, HIGHEST_VSOCK_PORT, self.name)
        return self._machine.driver.listen_vsock(self._machine.handle, port)

    def snapshot(self) -> Snapshot:
        """Save the VM as it is now, for clones to start from; it goes on afterwards.

        The snapshot is removed with the fixture that made the VM. A shared dir is unmounted in the guest meanwhile. Raises
        UnsupportedError for a VM with disks other than a root disk, with devices that were plugged in, that was resized or is
        paused, or that cannot be renewed: an image of its own without a root shell on its console, for instance.
        """
        with self._machine.log.timed(SNAPSHOT):
            snapshot = self._snapshot(self._machine)
        snapshot.on_clone = lambda name: self._machine.log.add(CLONE, name=name)
        return snapshot

    def pause(self) -> None:
        """Stop the guest's processors; raises UnsupportedError where the VMM cannot."""
        self._machine.driver.pause(self._machine.handle)
        self._machine.log.add(PAUSED)

    def resume(self) -> None:
        """Let a paused guest go on, with its clock set to the host's where it has a shell that was used, or is the built-in one.

        Elsewhere its clock stays behind by the time that it was paused.
        """
        machine = self._machine
        machine.driver.resume(machine.handle)
        machine.log.add(RESUMED)
        machine.health.told = False
        if machine.guest.sets_clock(shell_was_used=machine.channel.is_connected):
            try:
                renewal.set_clock(machine.channel.run)
            except (VmIOError, GuestCommandError) as error:
                logger.warning("%s: the guest's clock is behind by the time that it was paused: %s", self.name, error)

    def reboot(self, timeout: float | None = RUN_TIMEOUT_S) -> Self:
        """Have the guest reboot and block until it is ready again, for `timeout` seconds (None: no limit); returns the VM."""
        starts.reboot(self._machine, timeout)
        return self

    def shutdown(self, timeout: float | None = SHUTDOWN_TIMEOUT_S) -> None:
        """Ask the guest to power off and block until its VMM has ended.

        Asked over its shell where it has one, else with the power button. Raises StopFailedError where it does not within `timeout`
        seconds; the VM then still runs.
        """
        self._ending.shutdown(timeout)

    def stop(self) -> None:
        """End the VMM with SIGTERM, without asking the guest; raises StopFailedError where it needed SIGKILL."""
        self._ending.end(self._machine.driver.stop, "stop()")

    def kill(self) -> None:
        """End the VMM with SIGKILL."""
        self._ending.end(self._machine.driver.kill, "kill()")

    def close(self) -> None:
        """End the VM if it still runs and give back all it had; called by the fixture. Raises StopFailedError for what is left.

        In a process that was forked from the VM's it does nothing: whatever ends there, the VM is not its own.
        """
        self._ending.close()


class Snapshot:
    """A VM that a test saved. `clone()` starts another from there, any number of times; `close` removes it."""

    def __init__(
        self, names: Iterator[str], directory: Path, start: Callable[[str, Path, bool], Vm], remove: Callable[[], list[str]]
    ):
        self.directory = directory
        self._names = names
        self._start = start
        self._remove = remove
        self._closed = False
        # Called with the name of each clone.
        self.on_clone: Callable[[str], None] = lambda _name: None

    def clone(self, name: str | None = None, *, wait: bool = True) -> Vm:
        """Start a VM from the snapshot, a machine of its own, and return it when it is ready, or at once with `wait=False`.

        It has the saved VM's memory and running programs, and a name, addresses, host name, clock and random pool of its own.
        It ends with the fixture or test that made it, or with its `close`. Raises what `launch` does.
        """
        name = next(self._names) if name is None else name
        if self._closed:
            raise VmIOError(f"VM {name!r} cannot be cloned: its snapshot was closed; close it after its last clone()", vm_name=name)
        self.on_clone(name)
        return self._start(name, self.directory, wait)

    def close(self) -> list[str]:
        """Remove it; clones that run go on, but one with a root disk cannot be saved any more.

        Returns what could not be removed, in words.
        """
        self._closed = True
        return self._remove()

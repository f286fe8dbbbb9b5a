"""`Vm`: what a test holds."""

from __future__ import annotations

import io
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self, cast

from pytest_chvm.base.deadline import Deadline, checked_timeout
from pytest_chvm.base.steps import Step, take_all
from pytest_chvm.base.text import read_tail, shown_outputs
from pytest_chvm.base.untouched import Socket
from pytest_chvm.drivers.base import AbleDriver, VmDriver, logger, share_id
from pytest_chvm.drivers.boot import CONSOLE_FILE
from pytest_chvm.errors import (
    BootFailedError,
    CommandTimeoutError,
    GuestCommandError,
    GuestPanicError,
    InvalidConfigError,
    StopFailedError,
    UnsupportedError,
    VmError,
    VmIOError,
)
from pytest_chvm.guest import fetch, files, renewal
from pytest_chvm.guest.channels import Line, RenewingChannel, open_channel
from pytest_chvm.guest.kinds import Guest
from pytest_chvm.guest.kinds.built_in import READ_SET_UP
from pytest_chvm.guest.search import ConsoleSearch
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.relay import NamespaceRelay
from pytest_chvm.machine import hotplug, liveness
from pytest_chvm.machine.events import (
    CLONE,
    COMMAND,
    GET,
    PAUSED,
    PLUGGED,
    PUT,
    REBOOT,
    RESUMED,
    SNAPSHOT,
    UNPLUGGED,
    Event,
    EventLog,
)
from pytest_chvm.machine.health import Health, Telling, console_ends_with, ends_with
from pytest_chvm.machine.hotplug import Device
from pytest_chvm.machine.snapshot import Snapshot
from pytest_chvm.model import CommandResult, SharedDir, Tap, UserNetwork, VmConfig, VmHandle, VmState, VmStatus, as_path, check_port

RUN_TIMEOUT_S = 60.0
SHUTDOWN_TIMEOUT_S = 30.0
# How long a guest has to show that it lives, once there is a reason to doubt it.
ANSWER_TIMEOUT_S = 5.0
HIGHEST_TCP_PORT = (1 << 16) - 1
# The one above is anybody's (vsock(7), VMADDR_PORT_ANY).
HIGHEST_VSOCK_PORT = (1 << 32) - 2
# What `console` returns at most, from the end.
CONSOLE_LIMIT = 16 << 20


@dataclass(frozen=True, slots=True)
class Origin:
    """How a VM came to be: `boot` is "cold" or "clone", `why` says why it is no clone, `saved` is what a clone is from."""

    boot: str
    why: str = ""
    saved: Path | None = None
    # How many of its NICs have the saved VM's addresses at first.
    stale_nics: int = 0

    @property
    def in_words(self) -> str:
        """How it came to be, for a person."""
        return "a clone" if self.boot == "clone" else f"booted: {self.why}"


class Vm:
    """A virtual machine of a test's. Made by `launch` and `chvm_vm`; a context manager that ends it."""

    def __init__(
        self,
        config: VmConfig,
        handle: VmHandle,
        driver: VmDriver,
        *,
        boot_deadline: Deadline,
        guest: Guest,
        lease: Lease,
        virtiofsd: Path | None,
        origin: Origin,
        snapshot: Callable[[Vm], Snapshot],
        release: Callable[[], list[str]],
    ) -> None:
        self.config = config
        self.handle = handle
        self._log = EventLog(handle.event_log)
        self._log.add_spawned(handle, origin.in_words, [share.tag for share in config.shared_dirs])
        self._boot_deadline = boot_deadline
        self._lease = lease
        self._virtiofsd = virtiofsd
        self._guest = guest
        self.origin = origin
        self.plugged: dict[str, Device] = {}
        self.resized = False
        # Of all its snapshots' clones; cut so that a clone of a clone of a clone still has a name that a VM may have.
        self.clone_names = (f"{config.name[:50]}-clone{number}" for number in lease.host.clone_numbers)
        self._snapshot = snapshot
        self._release = release
        self.closed = False
        self._owner_pid = os.getpid()
        self._ended = False
        self._removed = False
        self._last_console: str | None = None
        self._relays: dict[int, NamespaceRelay] = {}
        self._forwarded: dict[int, tuple[str, int]] = {}
        self._health = Health(
            config,
            lambda: self.handle,
            driver,
            lease.keeper,
            lacks=guest.lacks,
            answers=self._answers,
            noticed=lambda error: self._log.add_trouble(error, vmm_ended=self._health.has_ended()),
            console_start=_size(origin.saved / CONSOLE_FILE) if origin.saved else 0,
        )
        self._driver = cast("AbleDriver", Telling(driver, self._health, config.name))
        self._shell = open_channel(
            guest.channel,
            Line(
                self.name,
                lambda: self._driver.open_console(handle),
                self._health.wake_fds,
                self.check_alive,
                self._health.check_ending,
                driver.abilities.console_piece,
            ),
        )

    def __repr__(self) -> str:
        return f"<Vm {self.name!r} {self.handle.vmm} pid {self.pid}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.config.name

    @property
    def pid(self) -> int:
        """The VMM's process id."""
        return self._health.process.pid

    @property
    def ip(self) -> str:
        """The guest's address, as its ready line said; raises VmIOError before that."""
        if self._health.ready.ip is None and self._health.ready.scan() is None:
            raise VmIOError(f"VM {self.name!r} has no IP yet: it is not ready; call wait_ready() first", vm_name=self.name)
        assert self._health.ready.ip is not None
        return self._health.ready.ip

    @property
    def status(self) -> VmStatus:
        """The VM's state and IP, looked up now."""
        if self._ended:
            return VmStatus(VmState.STOPPED)
        found = self._driver.state(self.handle)
        if found.state is VmState.STOPPED:
            self._health.told = True
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
        if self._last_console is not None:
            return self._last_console
        return read_tail(self.serial_log, CONSOLE_LIMIT).decode(errors="replace")

    @property
    def events(self) -> tuple[Event, ...]:
        """What has happened to the VM so far, in order, with times; see `pytest_chvm.machine.events` for the kinds.

        Of more than 10 000 events the first 100 and the latest are kept.
        """
        return self._log.events

    def wait_ready(self, timeout: float | None = None) -> Self:
        """Block until the guest has printed its ready marker; returns the VM.

        `timeout` is seconds from now; without it the boot's own deadline counts. Raises BootFailedError (EarlyGuestPanicError for a
        panic) as soon as the VMM ends or the guest's kernel gives up, and at the deadline.
        """
        # That of the first boot has long passed when it starts again after a panic.
        first = Deadline.after(self._boot_deadline.total_s) if self._health.panicked else self._boot_deadline
        deadline = first if timeout is None else Deadline.after(checked_timeout(timeout))

        def not_ready() -> BootFailedError:
            said = self._health.ready.refused
            return BootFailedError(
                f"VM {self.name!r} was not ready within {deadline.total_s:g} s: expected a line '{self.handle.ready_marker} IP' on "
                f"its serial console{f'; {said}' if said else ''}. Its console {self.serial_log} "
                f"{console_ends_with(self.serial_log, self.config)}\n"
                "What to do: raise --chvm-boot-timeout, look at the console, or have the guest print the line when it is up.",
                vm_name=self.name,
            )

        starts_anew = self._health.panicked
        ip = self._health.wait_for(self._health.ready.scan, deadline, not_ready)
        if starts_anew:
            self._started_anew()
        if (failed := self._health.not_set_up()) is not None:
            raise failed
        self._log.add_ready(ip)
        return self

    def _started_anew(self) -> None:
        self._health.started_anew()
        # Cloud Hypervisor has made a new console with the new boot.
        self._shell.close()

    def wait_for_console(self, pattern: str | re.Pattern[str], timeout: float | None = RUN_TIMEOUT_S) -> re.Match[str]:
        """Block until the serial console has text that matches, since the VM's start; returns the match.

        A match may span many lines, of what came within the last 64 KiB. `timeout` is seconds (None: no limit). Raises VmIOError
        after it, and at once when the VMM ends or the guest panics without a match.
        """
        search = ConsoleSearch(self.serial_log, re.compile(pattern))
        deadline = Deadline.after(checked_timeout(timeout))

        def no_match() -> VmIOError:
            return VmIOError(
                f"VM {self.name!r}: {search.pattern.pattern!r} did not appear on the console within {deadline.total_s:g} s; it "
                f"{ends_with(self.serial_log)}",
                vm_name=self.name,
            )

        if self._last_console is not None and (found := search.add(self._last_console)):
            return found
        return self._health.wait_for(search.scan, deadline, no_match)

    def check_up(self) -> VmError | None:
        """Return what has befallen the guest that the test has not been told of: a panic, an oops, the end of its VMM or sidecars.

        None where it is well, and of a VM that the test has ended.
        """
        if self.closed or self._ended:
            return None
        return self._health.check_up(self._taint)

    def _taint(self) -> int | None:
        try:
            return int(self._shell.run("cat /proc/sys/kernel/tainted", timeout=ANSWER_TIMEOUT_S, input=None).stdout)
        except (VmError, ValueError):
            return None

    def _answers(self) -> bool | None:
        line, token = liveness.question()
        if (asked := self._shell.poke(line, ANSWER_TIMEOUT_S)) is not True:
            return asked
        return liveness.was_answered(self.serial_log, token, Deadline.after(ANSWER_TIMEOUT_S), self.pid)

    @contextmanager
    def expect_panic(self, timeout: float = RUN_TIMEOUT_S) -> Iterator[None]:
        """Expect the guest's kernel to panic in the block, or within `timeout` seconds of its end; it may reboot for it.

        The panic is no error then, neither in the block, which ends with the call that notices it, nor at the end of the test.
        Afterwards `wait_ready()` blocks until the guest has started again, where it does. Raises VmIOError where it does not panic.
        """

        def none() -> VmIOError:
            return VmIOError(
                f"VM {self.name!r}: the guest did not panic within {timeout:g} s, and was expected to; its console "
                f"{ends_with(self.serial_log)}",
                vm_name=self.name,
            )

        self.check_alive()
        self.handle, self._health.shares = self._driver.allow_reboot(self.handle, self._health.shares)
        self._health.expects_panic = True
        try:
            yield
            self._health.wait_for(lambda: None, Deadline.after(timeout), none)
        except GuestPanicError as error:
            self._health.panic_was_expected(error)
            self._health.start_anew(self.handle.nonce)
            self._shell.close()
        except BaseException:
            with suppress(VmError):
                self._driver.settle(self.handle)
            raise
        finally:
            self._health.expects_panic = False

    def check_alive(self) -> None:
        """Raise what has become of the guest if it is not alive: a GuestError, BootFailedError, HypervisorError."""
        if self._ended:
            raise VmIOError(f"VM {self.name!r} was ended by the test", vm_name=self.name)
        self._health.check()

    def run(
        self, command: str | Sequence[str], *, timeout: float | None = RUN_TIMEOUT_S, input: str | bytes | None = None
    ) -> CommandResult:
        """Run a command in the guest and return what it did: a `str` goes to `sh`, a sequence is one program's arguments.

        Several threads may do so at once. `timeout` is seconds (None, 0 or infinity: no limit); CommandTimeoutError after it, when
        the command and all that it started in the guest are killed.
        Raises a GuestError, HypervisorError at once when the guest dies meanwhile, VmIOError where no shell answers.
        """
        with self._log.timed(COMMAND, command=str(command), returncode=None) as outcome:
            done = self._run(command, timeout=timeout, input=input)
            outcome["returncode"] = done.returncode
        return done

    def _run(self, command: str | Sequence[str], *, timeout: float | None, input: str | bytes | None) -> CommandResult:
        data = input.encode(errors="surrogateescape") if isinstance(input, str) else input
        self.check_alive()
        if (silent := self._health.no_shell()) is not None:
            raise silent
        try:
            return self._shell.run(command, timeout=timeout, input=data)
        except (CommandTimeoutError, VmIOError) as error:
            # What another thread's end of the VM does to a command says that it was ended; that its VMM is gone is no news then.
            if not self._ended:
                self._health.explain(error)
            raise

    def check_output(
        self, command: str | Sequence[str], *, timeout: float | None = RUN_TIMEOUT_S, input: str | bytes | None = None
    ) -> str:
        """Run a command that must succeed and return its standard output; raises GuestCommandError with both outputs."""
        done = self.run(command, timeout=timeout, input=input)
        if done.returncode != 0:
            raise GuestCommandError(
                f"VM {self.name!r}: {done.command!r} returned {done.returncode}.\n{shown_outputs(done.stdout, done.stderr)}",
                vm_name=self.name,
                returncode=done.returncode,
                stdout=done.stdout,
                stderr=done.stderr,
            )
        return done.stdout

    def put(self, src: str | os.PathLike[str], dst: str, *, timeout: float | None = RUN_TIMEOUT_S) -> None:
        """Copy a file or directory of the host's into the guest; see `pytest_chvm.guest.files.put`.

        `timeout`: CommandTimeoutError after so many seconds without progress (None: no limit).
        """
        with self._log.timed(PUT, source=os.fspath(src), destination=os.fspath(dst)):
            files.put(lambda script, data: self._run(script, input=data, timeout=timeout), Path(src), os.fspath(dst))

    def get(self, src: str, dst: str | os.PathLike[str], *, timeout: float | None = RUN_TIMEOUT_S) -> Path:
        """Copy a file or directory of the guest's to the host and return its path there; see `pytest_chvm.guest.fetch.get`.

        `timeout`: CommandTimeoutError after so many seconds without progress (None: no limit).
        """
        with self._log.timed(GET, source=os.fspath(src), destination=os.fspath(dst)):
            return fetch.get(lambda script, data: self._run(script, input=data, timeout=timeout), os.fspath(src), Path(dst))

    def _run_for_files(self, script: str, data: bytes | None) -> CommandResult:
        return self._run(script, input=data, timeout=RUN_TIMEOUT_S)

    def address(self, port: int) -> tuple[str, int]:
        """Return a host and port reachable from the test that lead to a TCP port of the guest's.

        On a TAP that is the guest's own address; in user mode QEMU forwards a port of the host's loopback; in a network namespace a
        relay of ours does. Raises UnsupportedError for a VM without a network.
        """
        check_port(port, HIGHEST_TCP_PORT, self.name)
        networks = self.config.networks or ()
        if not networks:
            raise UnsupportedError(
                f"VM {self.name!r} has no network: boot it with network='tap' or network='user'", vm_name=self.name
            )
        if isinstance(networks[0], UserNetwork):
            if port not in self._forwarded:
                self._forwarded[port] = self._driver.forward_port(self.handle, port)
            return self._forwarded[port]
        if self.config.netns is not None:
            if port not in self._relays:
                self._relays[port] = NamespaceRelay(self.config.netns, (self.ip, port))
            return self._relays[port].address
        return self.ip, port

    def open_channel(self, name: str) -> socket.socket:
        """Return a connection to one of the config's channels; raises InvalidConfigError for another name."""
        if name not in self.config.channels:
            raise InvalidConfigError(f"VM {self.name!r} has no channel {name!r}: name it in channels=[...]", vm_name=self.name)
        return Socket(fileno=self._driver.open_channel(self.handle, name))

    def info(self) -> dict[str, object]:
        """Return what the VMM says of the VM, in its own words."""
        return self._driver.info(self.handle)

    def counters(self) -> dict[str, object]:
        """Return what the VMM has counted of each device, in its own words."""
        return self._driver.counters(self.handle)

    def add_disk(self, image: str | os.PathLike[str], *, read_only: bool = False) -> Device:
        """Plug a disk in; the VM must have been booted with `hotplug=True`."""
        hotplug.require_room(self.config)
        return self._plugged_in(hotplug.add_disk(self._driver, self.handle, as_path("image", image), read_only=read_only))

    def add_network(self, tap: Tap | None = None) -> Device:
        """Plug a NIC in that is attached to a TAP (default: one of its own); the VM must have been booted with `hotplug=True`."""
        hotplug.require_room(self.config)
        if not self.config.outbound:
            raise UnsupportedError(f"VM {self.name!r} gets no TAP: it has outbound=False", vm_name=self.name)
        device, self.handle = hotplug.add_tap(self._driver, self.handle, self._lease, tap or Tap(), self.plugged.values())
        return self._plugged_in(device)

    def add_shared_dir(self, tag: str, host_path: str | os.PathLike[str], *, read_only: bool = False) -> Device:
        """Plug a shared dir in; the guest mounts it itself. The VM must have been booted with `hotplug=True`."""
        hotplug.require_room(self.config)
        share = SharedDir(tag, as_path("host_path", host_path), read_only)
        device, self.handle = hotplug.add_share(self._driver, self.handle, self._lease, share, self._virtiofsd)
        return self._plugged_in(device)

    def _plugged_in(self, device: Device) -> Device:
        self.plugged[device.id] = device
        if device.served is not None:
            self._health.shares.append(device.served)
        self._log.add(PLUGGED, id=device.id, device=device.kind)
        return device

    def remove(self, device: Device) -> None:
        """Unplug a device that was plugged in."""
        before = self._health.shares
        if device.served is not None:
            # By another virtiofsd after a reboot; its end is no trouble from now on.
            now = [each for each in before if each.socket == device.served.socket]
            self._health.shares = [each for each in before if each not in now]
            device = replace(device, served=now[0] if now else device.served)
        try:
            hotplug.remove(self._driver, self.handle, device)
        except BaseException:
            self._health.shares = before
            raise
        self.plugged.pop(device.id, None)
        self._log.add(UNPLUGGED, id=device.id, device=device.kind)

    def resize(self, *, cpus: int | None = None, memory_mb: int | None = None) -> None:
        """Give the VM another number of processors or MiB of memory, up to `max_cpus` and `max_memory_mb` of its config.

        Whether the guest takes them is its kernel's affair; one with udev or the built-in one brings new processors online.
        """
        self.resized = True
        self._driver.resize(self.handle, cpus=cpus, memory_mb=memory_mb)

    def vsock(self, port: int) -> socket.socket:
        """Return a stream connected to a vsock port of the guest's; raises VmIOError where nothing listens there."""
        check_port(port, HIGHEST_VSOCK_PORT, self.name)
        return self._driver.open_vsock(self.handle, port)

    def listen_vsock(self, port: int) -> socket.socket:
        """Return a listener that the guest reaches at a vsock port of CID 2, the host."""
        check_port(port, HIGHEST_VSOCK_PORT, self.name)
        return self._driver.listen_vsock(self.handle, port)

    def renew(self, words: Sequence[str]) -> None:
        """Have a clone made a machine of its own, which is told `words`; it then says that it is ready, which is not waited for.

        Raises VmIOError where it does not even begin before the boot's deadline.
        """
        line = renewal.line(words, stale_nics=self.origin.stale_nics)
        self._renewing.renew(renewal.message, line, self._boot_deadline)

    @property
    def _renewing(self) -> RenewingChannel:
        if not isinstance(self._shell, RenewingChannel):
            raise UnsupportedError(
                f"VM {self.name!r} cannot be saved: what runs its commands cannot renew a clone", vm_name=self.name
            )
        return self._shell

    def snapshot(self) -> Snapshot:
        """Save the VM as it is now, for clones to start from; it goes on afterwards.

        The snapshot is removed with the fixture that made the VM. A shared dir is unmounted in the guest meanwhile. Raises
        UnsupportedError for a VM with disks other than a root disk, with devices that were plugged in, that was resized or is
        paused, or that cannot be renewed: an image of its own without a root shell on its console, for instance.
        """
        with self._log.timed(SNAPSHOT):
            snapshot = self._snapshot(self)
        snapshot.on_clone = lambda name: self._log.add(CLONE, name=name)
        return snapshot

    def save(self, directory: Path, *, go_on: bool = True) -> None:
        """Save the VM to an empty directory; without `go_on` it stays paused. Raises what `snapshot` does."""
        self.check_alive()
        told = (self.config.cmdline or "").split()
        set_up = self._guest.set_up_for_saving(self._run_for_files, lambda: self.ip, told, trial=not go_on)
        with self._without_shares(), self._renewing.waiting(lambda token: renewal.waiting_line(set_up, token)):
            self._driver.pause(self.handle)
            try:
                self._driver.snapshot(self.handle, directory)
                self._save_console(directory / CONSOLE_FILE)
            finally:
                if go_on:
                    self._driver.resume(self.handle)

    def _save_console(self, copy: Path) -> None:
        # Without the ready line: each clone prints its own, and a test that looks for one is to find that.
        marker = self.handle.ready_marker.encode()
        lines = io.BytesIO(read_tail(self.serial_log, CONSOLE_LIMIT))
        with copy.open("wb") as saved:
            saved.writelines(line for line in lines if marker not in line)

    @contextmanager
    def _without_shares(self) -> Iterator[None]:
        """Unplug the shared dirs, which no VMM saves, and plug them in again afterwards."""
        shares = list(self._health.shares)
        unplugged = []
        try:
            for index, served in enumerate(shares):
                self.check_output(["umount", f"/mnt/{served.share.tag}"])
                # Its virtiofsd's end is no trouble from now on.
                self._health.shares = shares[index + 1 :]
                unplugged.append(index)
                hotplug.remove(self._driver, self.handle, Device(share_id(served.share), "fs", served=served))
            yield
        finally:
            for index in unplugged:
                share = shares[index].share
                device, self.handle = hotplug.add_share(self._driver, self.handle, self._lease, share, self._virtiofsd)
                assert device.served is not None
                shares[index] = device.served
                self.check_output(f"{READ_SET_UP}; chvm_share {share.guest_word}")
            self._health.shares = shares
            served_by = tuple(served.process for served in shares)
            self.handle = replace(self.handle, sidecars=served_by)

    def pause(self) -> None:
        """Stop the guest's processors; raises UnsupportedError where the VMM cannot."""
        self._driver.pause(self.handle)
        self._log.add(PAUSED)

    def resume(self) -> None:
        """Let a paused guest go on, with its clock set to the host's where it has a shell that was used, or is the built-in one.

        Elsewhere its clock stays behind by the time that it was paused.
        """
        self._driver.resume(self.handle)
        self._log.add(RESUMED)
        self._health.told = False
        if self._guest.sets_clock(shell_was_used=self._shell.is_connected):
            try:
                renewal.set_clock(self._shell.run)
            except (VmIOError, GuestCommandError) as error:
                logger.warning("%s: the guest's clock is behind by the time that it was paused: %s", self.name, error)

    def reboot(self, timeout: float | None = RUN_TIMEOUT_S) -> Self:
        """Have the guest reboot and block until it is ready again, for `timeout` seconds (None: no limit); returns the VM."""
        timeout = checked_timeout(timeout)
        self.handle, self._health.shares = self._driver.allow_reboot(self.handle, self._health.shares)
        self.handle = replace(self.handle, nonce=self._guest.nonce_after_reboot(self.handle.nonce))
        self._log.add(REBOOT)
        self._health.start_anew(self.handle.nonce)
        self._shell.tell("sync; reboot -f", timeout)
        self.wait_ready(timeout)
        self._started_anew()
        return self

    def shutdown(self, timeout: float | None = SHUTDOWN_TIMEOUT_S) -> None:
        """Ask the guest to power off and block until its VMM has ended.

        Asked over its shell where it has one, else with the power button. Raises StopFailedError where it does not within `timeout`
        seconds; the VM then still runs.
        """
        self._require_owner()
        deadline = Deadline.after(checked_timeout(timeout))
        self.check_alive()
        try:
            self._shell.tell("sync; poweroff -f || poweroff", deadline.remaining_s)
        except (VmIOError, UnsupportedError):
            self._driver.power_button(self.handle)
        if not self._health.wait_ended(deadline):
            raise StopFailedError(
                f"VM {self.name!r} did not power off within {deadline.total_s:g} s; its console {ends_with(self.serial_log)}\n"
                "stop() ends the VMM without asking the guest.",
                vm_name=self.name,
            )
        self._finish(self._driver.kill, "shutdown()")

    def stop(self) -> None:
        """End the VMM with SIGTERM, without asking the guest; raises StopFailedError where it needed SIGKILL."""
        self._finish(self._driver.stop, "stop()")

    def kill(self) -> None:
        """End the VMM with SIGKILL."""
        self._finish(self._driver.kill, "kill()")

    def _require_owner(self) -> None:
        if os.getpid() != self._owner_pid:
            raise UnsupportedError(
                f"VM {self.name!r} is process {self._owner_pid}'s, and this process ({os.getpid()}) was forked from it: end the VM "
                "there, or as another process does, by a driver's stop(vm.handle) or kill(vm.handle)",
                vm_name=self.name,
            )

    def _finish(self, end: Callable[[VmHandle], None], how: str) -> None:
        self._require_owner()
        if not self._ended:
            try:
                self._end(end, how)
            finally:
                self.close()

    def _end(self, end: Callable[[VmHandle], None], how: str) -> None:
        """Take each step whatever becomes of those before it: the test may be interrupted in any of them."""
        try:
            self._log.add_ended(how)
            # The log may go with the run directory.
            self._last_console = self._last_console or self.console
        finally:
            self._ended = True
            try:
                self._shell.close()
            finally:
                try:
                    end(self.handle)
                except VmError:
                    self._removed = True
                    raise
                self._removed = True

    def close(self) -> None:
        """End the VM if it still runs and give back all it had; called by the fixture. Raises StopFailedError for what is left.

        In a process that was forked from the VM's it does nothing: whatever ends there, the VM is not its own.
        """
        if self.closed or os.getpid() != self._owner_pid:
            return
        self.closed = True
        steps: list[Step] = [] if self._removed else [lambda: self._end(self._driver.kill, "close()")]
        steps += [relay.close for relay in self._relays.values()]
        if failures := take_all([*steps, self._health.close, self._release, self._log.close]):
            raise StopFailedError("; ".join(failures), vm_name=self.name)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0

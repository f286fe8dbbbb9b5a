"""`Machine`: one running VM as this package's rooms see it; `Vm` is what users see of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pytest_chvm.base.deadline import Deadline
from pytest_chvm.base.text import read_tail, shown_outputs
from pytest_chvm.drivers.base import AbleDriver, VmDriver
from pytest_chvm.drivers.boot import CONSOLE_FILE, KERNEL_TIME_FILE
from pytest_chvm.errors import CommandTimeoutError, GuestCommandError, UnsupportedError, VmError, VmIOError
from pytest_chvm.guest.channels import Channel, Line, Process, StartingChannel, open_channel
from pytest_chvm.guest.commands import Place, Script, script_of, shown
from pytest_chvm.guest.kinds import Guest
from pytest_chvm.guest.kinds.built_in import PUT_MODULES_AWAY, SHOW_MODULES
from pytest_chvm.host.leases import Lease
from pytest_chvm.machine import liveness
from pytest_chvm.machine.device import Device
from pytest_chvm.machine.events import SPLAT, EventLog
from pytest_chvm.machine.health import Health, Telling
from pytest_chvm.machine.splats import SplatWatch, saved_time_s
from pytest_chvm.model import CommandResult, VmConfig, VmHandle, VmState

# What only some tests use is imported by them: each process that starts a VM would wait for it.
if TYPE_CHECKING:
    from pytest_chvm.model.kernel_log import KernelMessage, Splat

RUN_TIMEOUT_S = 60.0
# How long a guest has to show that it is alive, once there is reason to doubt it.
ANSWER_TIMEOUT_S = 5.0
# Of the kernel's Documentation/admin-guide/tainted-kernels: it had an oops.
TAINT_DIE = 1 << 7
# BusyBox and util-linux.
DMESG = "dmesg -r"
# What is read of a console at most, from its end.
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


@dataclass(eq=False)
class Machine:
    """One VM from the start of its VMM on; `handle` is as it is now.

    `boot_deadline`: until when the guest has to be ready. `virtiofsd`: the one that the settings name. `channel` runs its
    commands. `last_console`: what its serial console had when it was ended.
    """

    config: VmConfig
    handle: VmHandle
    guest: Guest
    origin: Origin
    lease: Lease
    virtiofsd: Path | None
    boot_deadline: Deadline
    vmm_driver: InitVar[VmDriver]
    log: EventLog = field(init=False)
    health: Health = field(init=False)
    driver: AbleDriver = field(init=False)
    channel: Channel = field(init=False)
    splats: SplatWatch = field(init=False)
    # Devices that were plugged in, by their ids.
    plugged: dict[str, Device] = field(default_factory=dict)
    resized: bool = False
    # How often the guest has started again.
    starts: int = 0
    last_console: str | None = None

    def __post_init__(self, vmm_driver: VmDriver) -> None:
        self.log = EventLog(self.handle.event_log)
        with ExitStack() as undo:
            undo.callback(self.log.close)
            self.log.add_spawned(self.handle, self.origin.in_words, [share.tag for share in self.config.shared_dirs])
            self.health = Health(
                self.config,
                lambda: self.handle,
                vmm_driver,
                self.lease.keeper,
                lacks=self.guest.lacks,
                answers=self._answers,
                noticed=lambda error: self.log.add_trouble(error, vmm_ended=self.health.has_ended()),
                console_start=_size(self.origin.saved / CONSOLE_FILE) if self.origin.saved else 0,
            )
            undo.callback(self.health.close)
            self.driver = cast("AbleDriver", Telling(vmm_driver, self.health, self.name))
            started = self.handle
            line = Line(
                self.name,
                lambda: self.driver.open_console(started),
                self.health.wake_fds,
                self.check_alive,
                self.health.check_ending,
                vmm_driver.abilities.console_piece,
                self.guest.connect_timeout_s,
            )
            self.channel = open_channel(self.guest.channel, line)
            self.splats = self._new_splat_watch()
            undo.pop_all()

    def _new_splat_watch(self) -> SplatWatch:
        saved = self.origin.saved
        return SplatWatch(
            self.handle.serial_log,
            start=_size(saved / CONSOLE_FILE) if saved else 0,
            since_s=saved_time_s(saved / KERNEL_TIME_FILE) if saved else -1.0,
            ask=self._kernel_log,
            # A shell that no test has used may be somebody's login prompt.
            asks=lambda: not self.warns_on_console and self.channel.is_connected,
        )

    @property
    def warns_on_console(self) -> bool:
        """Whether all that the guest's kernel warns of is in the serial log."""
        consoles = re.findall(r"(?:^|\s)console=(\S+)", self.config.cmdline or "")
        return self.guest.warns_on_console and (
            not consoles or any(name.startswith("tty") and name[3:4].isupper() for name in consoles)
        )

    def close(self) -> None:
        """Let go of what is watched, and of the event log's file."""
        try:
            self.health.close()
        finally:
            self.log.close()

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.config.name

    @property
    def ip(self) -> str:
        """The guest's address, as its ready line said; raises VmIOError before that."""
        ip = self.health.ready.ip or self.health.ready.scan()
        if ip is None:
            raise VmIOError(f"VM {self.name!r} has no IP yet: it is not ready; call wait_ready() first", vm_name=self.name)
        return ip

    def serial_text(self) -> bytes:
        """Return what the guest has written to its serial console, the last 16 MiB."""
        return read_tail(self.handle.serial_log, CONSOLE_LIMIT)

    def console_text(self) -> str:
        """Return that as text, undecodable bytes replaced; of a VM that has ended too."""
        return self.serial_text().decode(errors="replace") if self.last_console is None else self.last_console

    @property
    def ended(self) -> bool:
        """Whether the test has ended it, or is about to."""
        return self.health.ended

    def check_alive(self) -> None:
        """Raise the guest's error if it is not alive: a GuestError, BootFailedError or HypervisorError."""
        self.health.check()

    def check_up(self) -> VmError | None:
        """Return an error that the test has not been told of: a panic, the end of the VMM or of a sidecar.

        None where it is well, and of a VM that the test has ended.
        """
        return None if self.ended else self.health.check_up()

    def take_splats(self) -> list[Splat]:
        """Return the splats that nobody has been told of, of a VM that has ended too."""
        if not self.ended:
            self.splats.collect()
        taken = self.splats.take()
        if any(splat.taint is None or not splat.modules for splat in taken) and not self.ended:
            taken = self._with_state(taken)
        for splat in taken:
            self.log.add(SPLAT, text=splat.title, commands=list(splat.commands))
        return taken

    def _with_state(self, splats: list[Splat]) -> list[Splat]:
        """Return splats with the taint and the modules that their kernel has now, where they do not say."""
        from pytest_chvm.guest.splats import module_names

        said = (self._ask("cat /proc/sys/kernel/tainted && cut -d' ' -f1 /proc/modules") or b"").decode(errors="replace").split()
        if not said or not said[0].isdecimal():
            return splats
        taint, modules = "Not tainted" if said[0] == "0" else f"Tainted: {said[0][:20]}", module_names(said[1:])
        return [replace(splat, taint=splat.taint or taint, modules=splat.modules or modules) for splat in splats]

    def dmesg(self) -> list[KernelMessage]:
        """Return the messages in the log of the guest's kernel; raises GuestCommandError where the guest has no `dmesg`."""
        from pytest_chvm.guest.kernel_log import parse_dmesg

        done = self.run(DMESG, input=None)
        self.check_succeeded(done)
        return parse_dmesg(done.stdout_bytes)

    def run(
        self,
        command: str | Sequence[str],
        *,
        timeout: float | None = RUN_TIMEOUT_S,
        input: bytes | None,
        place: Place | None = None,
        is_tests: bool = True,
    ) -> CommandResult:
        """Run a command in the guest; see `Channel.run`. Raises what has become of the guest where it does not answer.

        `place`: where it runs; GuestCommandError where the guest has no such place. `is_tests`: it runs where this kind of guest
        has the commands of tests run; one of ours has the programs of what runs those.
        """
        self._check_shell()
        told = self._told(command, place) if is_tests else command
        try:
            with self.splats.during(str(shown(command))):
                done = self.channel.run(told, timeout=timeout, input=input)
        except (CommandTimeoutError, VmIOError) as error:
            # Where another thread has ended the VM, the error says so already; the VMM's end explains nothing then.
            if not self.ended:
                self.health.explain(error)
            raise
        if told is not command:
            done = replace(done, command=shown(command))
        if place:
            self._check_place(place, done)
        return done

    def popen(self, command: str | Sequence[str], *, input: bytes | None, place: Place | None = None) -> Process:
        """Start a process in the guest that runs beside the test; see `StartingChannel.popen`. Raises as `run` does."""
        self._check_shell()
        if not isinstance(self.channel, StartingChannel):
            raise UnsupportedError(
                f"VM {self.name!r}: what runs its commands cannot have a process run beside the test: use run()", vm_name=self.name
            )
        told = self._told(command, place)
        if place:
            # Its output is the test's: that there is no such place is to be known before.
            self._check_place(place, replace(self.run(place.check_script(), input=None), command=shown(command)))
        try:
            return self.channel.popen(told, input=input)
        except (CommandTimeoutError, VmIOError) as error:
            if not self.ended:
                self.health.explain(error)
            raise

    def _check_shell(self) -> None:
        self.check_alive()
        if (silent := self.health.no_shell()) is not None:
            raise silent

    def _told(self, command: str | Sequence[str], place: Place | None) -> str | Sequence[str]:
        """Return what the guest's shell is told for a command: this kind of guest's own place first, then what the test says."""
        told = self.guest.in_its_place(place.script(command) if place else command)
        return command if told is command else Script(script_of(told), shown(command))

    def _check_place(self, place: Place, done: CommandResult) -> None:
        refusal = place.refusal(done.returncode, done.stderr)
        if refusal is not None:
            raise GuestCommandError(f"VM {self.name!r}: {done.command!r} was not run: {refusal}", vm_name=self.name)

    def check_succeeded(self, done: CommandResult) -> None:
        """Raise GuestCommandError, with both outputs, for a command that returned non-zero."""
        if done.returncode != 0:
            raise GuestCommandError(
                f"VM {self.name!r}: {done.command!r} returned {done.returncode}.\n{shown_outputs(done.stdout, done.stderr)}",
                vm_name=self.name,
                returncode=done.returncode,
                stdout=done.stdout,
                stderr=done.stderr,
            )

    def allow_reboot(self) -> None:
        """Allow the guest's next reboot, which would otherwise be an error or end the VMM."""
        self.handle, self.health.shares = self.driver.allow_reboot(self.handle, self.health.shares)

    def started_anew(self) -> None:
        """Take note that the guest, which was expected to start again, is ready."""
        self.health.started_anew()
        self.starts += 1
        # Cloud Hypervisor has made a new console with the new boot.
        self.channel.close()

    def had_oops(self) -> bool:
        """Tell whether the guest's kernel says of itself that it had an oops; True where it does not answer."""
        said = self._ask("cat /proc/sys/kernel/tainted")
        return said is None or not said.strip().isdigit() or bool(int(said) & TAINT_DIE)

    @contextmanager
    def modules_put_away(self) -> Iterator[None]:
        """Have the disk with the modules of the guest's kernel be gone while another is plugged in, which is named as without it.

        Afterwards the guest has seen the other.
        """
        is_away = self.guest.modules_disk is not None and self._ask(PUT_MODULES_AWAY) is not None
        yield
        if is_away:
            self._ask(SHOW_MODULES)

    def _kernel_log(self) -> bytes | None:
        return self._ask(DMESG)

    def _ask(self, command: str) -> bytes | None:
        """Return what a short command prints; None where the guest does not run it, or cannot now."""
        try:
            if self.health.has_ended() or self.health.panicked or self.driver.state(self.handle).state is VmState.PAUSED:
                return None
            done = self.channel.run(command, timeout=ANSWER_TIMEOUT_S, input=None)
        except VmError:
            return None
        return done.stdout_bytes if done.returncode == 0 else None

    def _answers(self) -> bool | None:
        line, token = liveness.question()
        if (asked := self.channel.poke(line, ANSWER_TIMEOUT_S)) is not True:
            return asked
        deadline = Deadline.after(ANSWER_TIMEOUT_S)
        return liveness.was_answered(self.handle.serial_log, token, deadline, self.health.process.pid)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0

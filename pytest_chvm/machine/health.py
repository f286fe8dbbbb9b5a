"""Watches one VM: its console, its VMM and its sidecars. Says in words what has happened to it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pytest_chvm.base.deadline import Deadline, wait_readable
from pytest_chvm.base.pidfds import open_pidfd
from pytest_chvm.base.text import last_lines
from pytest_chvm.base.watch import FileWatch
from pytest_chvm.drivers.base import Reboots, VmDriver, Watches, method_of
from pytest_chvm.errors import (
    BootFailedError,
    EarlyGuestPanicError,
    GuestPanicError,
    HostError,
    HypervisorError,
    VmError,
    VmIOError,
)
from pytest_chvm.guest.kernels.image import why_silent
from pytest_chvm.guest.ready import PanicScanner, ReadyScanner
from pytest_chvm.host.keeper.remains import start_time_ticks
from pytest_chvm.host.keeper_client import Keeper
from pytest_chvm.model import HOST_ROOT_TAG, ProcessIdentity, ServedShare, VmConfig, VmHandle, VmState, names_in_guest

Found = TypeVar("Found")
EMPTY = "is empty."
VMM_END_S = 0.5
VMM_OUT_S = 2.0


class Health:
    """The watch over one VM, until `close`; `handle` returns the VM's handle as it is now.

    `keeper` has started its processes. `lacks` says why the guest may lack drivers. `answers` tells whether the guest's shell still
    does something (None: it cannot be asked now). `noticed` is called with each error of the guest or its VMM. `console_start`: how
    much of the console's log is of a VM that was saved.
    """

    def __init__(
        self,
        config: VmConfig,
        handle: Callable[[], VmHandle],
        driver: VmDriver,
        keeper: Keeper,
        *,
        lacks: str | None,
        answers: Callable[[], bool | None],
        noticed: Callable[[VmError], None],
        console_start: int,
    ) -> None:
        first = handle()
        assert first.process is not None
        self.process = first.process
        self.ready = ReadyScanner(first.serial_log, first.ready_marker, first.nonce, first.nonce is not None)
        # The virtiofsd that serves each shared dir now.
        self.shares = _served(config, first)
        # Whether the test has already been told of the error.
        self.told = False
        # By the test: whatever waits, in another thread, is told so then.
        self.ended = False
        self.lacks = lacks
        self._config = config
        self._handle = handle
        self._driver = driver
        self._keeper = keeper
        self._answers = answers
        self._noticed = noticed
        self._panic = PanicScanner(first.serial_log, start=console_start)
        # Where a panic is expected its text is enough: a crash kernel takes over before the panic device can report it.
        self.expects_panic = False
        self._expected: GuestPanicError | None = None
        self._asking = False
        self._pidfds: dict[int, int] = {}
        events = driver.event_log(first) if isinstance(driver, Watches) else None
        # Opened last: an interrupt before this line leaves nothing open.
        self._watch = FileWatch(first.serial_log, *([events] if events else []))

    def close(self) -> None:
        """Let go of what is watched."""
        self._watch.__exit__(None, None, None)
        while self._pidfds:
            os.close(self._pidfds.popitem()[1])

    def has_ended(self) -> bool:
        """Tell whether the VMM is gone."""
        return has_ended(self.process)

    def check(self) -> None:
        """Raise the error that the guest is in, if any: a panic, an event of the VMM, the end of the VMM or of a sidecar."""
        if not self.ended:
            self._watch.clear()
        self._raise_trouble()

    def check_up(self) -> VmError | None:
        """Return an error of the guest that the test has not been told of yet; None where there is none."""
        if self.told:
            return None
        try:
            self.check()
        except VmError as error:
            return error
        return None

    def explain(self, error: VmError) -> None:
        """Raise the cause of an answer's not coming in time; where none is known, add to `error` what the VMM says."""
        try:
            self.check()
            if (text := self._panic.panic) and self._is_dead():
                raise self._panicked(text)
        except VmError as cause:
            self.told = True
            self._noticed(cause)
            raise cause from error
        try:
            state = self._driver.run_state(self._handle()) if isinstance(self._driver, Watches) else None
            said = state and f"The VMM says that the guest does not run: it is {state!r}."
        except VmError as silent:
            said = f"The VMM does not say whether the guest runs: {silent}"
        if said:
            error.args = (f"{error}\n{said}",)

    def not_set_up(self) -> VmError | None:
        """Return the error of a guest that is ready without something that its config asks for; None where it has all."""
        names = [name for word in self.ready.failed if (name := self._name_of(word))]
        if not names:
            return None
        log = self._handle().serial_log
        return BootFailedError(
            f"VM {self._config.name!r} is up, but without {', '.join(names)}: its guest could not set that up. "
            f"{f'Its kernel has {self.lacks}. ' if self.lacks else ''}Its console {log} {ends_with(log)}",
            vm_name=self._config.name,
        )

    def _name_of(self, word: str) -> str | None:
        """Return what a word in the ready line stands for; None for something that a guest can do without."""
        kind, number = word.rstrip("0123456789"), word.lstrip("abcdefghijklmnopqrstuvwxyz")
        if kind == "share" and int(number) < len(self._config.shared_dirs):
            share = self._config.shared_dirs[int(number)]
            return "the host's root" if share.tag == HOST_ROOT_TAG else f"shared dir {share.tag!r} ({share.host_path})"
        if kind == "module" and int(number) < len(self._config.modules):
            return f"the module {self._config.modules[int(number)]!r}"
        if word.startswith("disk"):
            disks = self._config.all_disks
            named = dict(zip(names_in_guest(disks), disks, strict=True))
            name = word.removeprefix("disk")
            return f"{named.get(name, 'a disk')} (/dev/{name})"
        if kind == "cloud-init":
            # Of what is none of the test's own it may fail in an image that is as it should be.
            return "what cloud-init was told to do" if any(self._config.seed_texts.values()) else None
        return {"share": f"shared dir number {number}", "nic": f"the network of its NIC number {number} (eth{number})"}.get(kind)

    def no_shell(self) -> VmError | None:
        """Return why no shell can answer: the guest has said that it has none, or has panicked as expected."""
        if self._expected is not None and not self.ready.scan():
            return GuestPanicError(
                f"VM {self._config.name!r}: the guest panicked, as expected; wait_ready() blocks until it has started again: "
                f"{self._expected}",
                vm_name=self._config.name,
            )
        if "console" not in self.ready.failed:
            return None
        why = f": its kernel has {self.lacks}" if self.lacks else ""
        return VmIOError(
            f"VM {self._config.name!r}: no shell answers, since the guest has no virtio console (hvc0){why}",
            vm_name=self._config.name,
        )

    def start_anew(self, nonce: str | None) -> None:
        """Forget what the guest has printed: it is about to start again, and its ready line must then have this nonce, if any."""
        self.ready.expect_again(nonce)
        self._panic.forget()

    def started_anew(self) -> None:
        """Treat all that happened before the guest started again as handled."""
        if isinstance(self._driver, Reboots):
            self._driver.settle(self._handle())
        self._expected, self.told = None, False

    @property
    def panicked(self) -> bool:
        """Whether the guest has panicked as expected, and has not been seen to start again."""
        return self._expected is not None

    def panic_was_expected(self, error: GuestPanicError) -> None:
        """Treat a panic as intended by the test, until the guest has started again."""
        self._expected, self.told = error, True

    def _raise_trouble(self) -> None:
        if self.ended:
            raise VmIOError(f"VM {self._config.name!r} was ended by the test", vm_name=self._config.name)
        if self._asking:
            return
        # Until `started_anew` is called the driver still reports the panic.
        if self._expected is not None:
            self._raise_after_panic()
            return
        try:
            self._look_for_trouble()
        except VmError as error:
            self.told = True
            self._noticed(error)
            raise

    def _raise_after_panic(self) -> None:
        """Raise the end of the VMM, the only news of a guest that panicked as expected and may start again."""
        if self.has_ended():
            raise HypervisorError(self._why_ended(), vm_name=self._config.name)

    def _look_for_trouble(self) -> None:
        name = self._config.name
        trouble = self._driver.trouble(self._handle()) if isinstance(self._driver, Watches) else None
        text = self._panic.scan()
        if isinstance(trouble, GuestPanicError):
            raise self._panicked(text or str(trouble))
        if text and (
            self.expects_panic
            or trouble
            or self.has_ended()
            or not self.ready.scan()
            or (not self._tells_panic() and self._is_dead())
        ):
            raise self._panicked(text)
        if trouble is not None:
            if self.ready.scan():
                raise trouble
            # Where the VMM ends for this, its end says more.
            if not self.wait_ended(Deadline.after(VMM_END_S)):
                log = self._handle().serial_log
                raise BootFailedError(f"{trouble}, before it was ready. Its console {log} {ends_with(log)}", vm_name=name)
        if self.has_ended():
            kind = HypervisorError if self.ready.scan() else BootFailedError
            raise kind(self._why_ended(), vm_name=name)
        self._check_sidecars()

    def _tells_panic(self) -> bool:
        """Whether the panic device reports panics, so that text on the console need not be looked at."""
        return self.ready.nonce is not None and "panic" not in self.ready.failed

    def _is_dead(self) -> bool:
        """Tell whether a guest with the text of a panic on its console does not answer. Where it does, the text is forgotten."""
        if self._driver.state(self._handle()).state is VmState.PAUSED:
            return False
        self._asking = True
        try:
            answers = self._answers()
        finally:
            self._asking = False
        if answers:
            self._panic.panic = None
        return answers is False

    def _panicked(self, what: str) -> GuestPanicError:
        name, log = self._config.name, self._handle().serial_log
        kind = GuestPanicError if self.ready.scan() else EarlyGuestPanicError
        return kind(
            f"VM {name!r}: the guest's kernel gave up: {what.removeprefix(f'VM {name!r}: ')}. Its console {log} {ends_with(log)}",
            vm_name=name,
        )

    def check_ending(self) -> None:
        """Raise the end of a VMM that is just ending; waits for it for two seconds at most."""
        self.wait_ended(Deadline.after(VMM_OUT_S))
        self.check()

    def _check_sidecars(self) -> None:
        for served in list(self.shares):
            if has_ended(served.process):
                # A virtiofsd also ends with its VMM, and notices that end a moment before we do.
                if self.wait_ended(Deadline.after(VMM_END_S)):
                    self._look_for_trouble()
                share = served.share
                raise HypervisorError(
                    f"VM {self._config.name!r}: virtiofsd (pid {served.process.pid}) for shared dir {share.tag!r} "
                    f"({share.host_path}) {_how(served.process, self._keeper)} while the VM runs; its log {ends_with(served.log)}",
                    vm_name=self._config.name,
                )

    def _why_ended(self) -> str:
        handle = self._handle()
        when = "after it was ready" if self.ready.ip else "before it was ready"
        hint = self._driver.failure_hint()
        return (
            f"VM {handle.name!r}: its VMM (pid {self.process.pid}) {_how(self.process, self._keeper)}, {when}. "
            f"Its log {handle.vmm_log} {ends_with(handle.vmm_log)}\n"
            f"The guest's console {console_ends_with(handle.serial_log, self._config)}\n"
            f"To repeat it: {shlex.join(handle.command)}{f'{chr(10)}{hint}' if hint else ''}"
        )

    def wake_fds(self) -> list[int]:
        """Return descriptors, one of which becomes readable when there is something new for `check`."""
        for process in (self.process, *self._handle().sidecars):
            if process.pid not in self._pidfds:
                try:
                    self._pidfds[process.pid] = open_pidfd(process.pid)
                except ProcessLookupError:
                    self._raise_trouble()
        gone = [pid for pid, fd in self._pidfds.items() if pid != self.process.pid and wait_readable([fd], Deadline.after(0))]
        if gone:
            # Otherwise it was unplugged on purpose, and must not wake anybody again.
            self._raise_trouble()
        return [self._watch.fileno(), *(fd for pid, fd in self._pidfds.items() if pid not in gone)]

    def wait_for(self, look: Callable[[], Found | None], deadline: Deadline, gave_up: Callable[[], VmError]) -> Found:
        """Block until `look` finds something on the console; raises what `check` does, and `gave_up()` at the deadline."""
        try:
            return self._wait_for(look, deadline, gave_up)
        except (OSError, ValueError):
            # Where another thread ends the VM, what is waited for here is closed at any line.
            if self.ended:
                self._raise_trouble()
            raise

    def _wait_for(self, look: Callable[[], Found | None], deadline: Deadline, gave_up: Callable[[], VmError]) -> Found:
        while True:
            # Cleared before the look, so that what is written between the look and the wait still wakes.
            self._watch.clear()
            if (found := look()) is not None or (self.has_ended() and (found := look()) is not None):
                return found
            self._raise_trouble()
            if deadline.expired:
                error = gave_up()
                self.explain(error)
                raise error
            # In short waits: another thread's check may have consumed the event that was to wake this one.
            wait_readable(self.wake_fds(), Deadline.after(deadline.wait_s))

    def wait_ended(self, deadline: Deadline) -> bool:
        """Block until the VMM is gone; tells whether it is."""
        try:
            pidfd = open_pidfd(self.process.pid)
        except ProcessLookupError:
            return True
        try:
            while not self.has_ended() and not deadline.expired:
                wait_readable([pidfd], deadline)
        finally:
            os.close(pidfd)
        return self.has_ended()


class Telling:
    """A VM's driver that reports the end of the VMM as `Health` does, and refuses what the VMM cannot do."""

    def __init__(self, driver: VmDriver, health: Health, vm_name: str) -> None:
        self._of = driver, health, vm_name

    def __getattr__(self, name: str) -> Any:
        driver, health, vm_name = self._of
        found = method_of(driver, name, vm_name)
        if not callable(found):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            try:
                return found(*arguments, **named)
            except VmError:
                if health.has_ended():
                    health.told = True
                raise

        return call


def _served(config: VmConfig, handle: VmHandle) -> list[ServedShare]:
    """Return who serves the shared dirs of a VM that was just started, as its driver has named the sockets."""
    assert handle.run_dir is not None
    pairs = zip(config.shared_dirs, handle.sidecars, strict=True)
    return [ServedShare(share, process, handle.run_dir / f"fs{index}.sock") for index, (share, process) in enumerate(pairs)]


def has_ended(process: ProcessIdentity) -> bool:
    """Tell whether a process is gone."""
    return start_time_ticks(process.pid) != process.start_time_ticks


def _how(process: ProcessIdentity, keeper: Keeper) -> str:
    try:
        code = keeper.returncode(process)
    except HostError as error:
        return f"ended ({error})"
    return f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"


def console_ends_with(log: Path, config: VmConfig) -> str:
    """Return the last lines of a guest's console for a message, or likely causes where it is empty."""
    words = ends_with(log)
    return f"{words} {why_silent(config.cmdline, config.architecture)}" if words == EMPTY else words


def ends_with(log: Path) -> str:
    """Return a log's last lines for a message, cleaned and bounded."""
    lines = last_lines(log)
    return f"ends with:\n{lines}" if lines else EMPTY

"""The one place that turns a `VmConfig` into a ready `Vm` and back; usable without pytest."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Unpack

from pytest_chvm.base.deadline import Deadline
from pytest_chvm.base.steps import take_all
from pytest_chvm.base.untouched import random_hex
from pytest_chvm.clones.digests import content_key
from pytest_chvm.clones.snapshots import new_directory, snapshots_dir
from pytest_chvm.clones.store import HeldTemplate
from pytest_chvm.clones.templates import clone_config, template_config, why_no_snapshot
from pytest_chvm.drivers.base import logger
from pytest_chvm.drivers.boot import MEMORY_FILE, ROOT_FILE, BootOptions
from pytest_chvm.drivers.disks import check_was_closed
from pytest_chvm.drivers.memory import copy_sparse
from pytest_chvm.drivers.preflight import preflight
from pytest_chvm.errors import BootFailedError, GuestPanicError, HostError, StopFailedError, UnsupportedError, VmError
from pytest_chvm.guest.choice import told_config
from pytest_chvm.host.budget import Share, budget_of, take_share
from pytest_chvm.host.host import Host, default_host
from pytest_chvm.host.leases import Lease
from pytest_chvm.machine import saving
from pytest_chvm.machine.guest_choice import cache_dir
from pytest_chvm.machine.machine import Machine, Origin
from pytest_chvm.machine.nics import Nics, lease_nics
from pytest_chvm.machine.plan import FIRST_OF_IMAGE, Plan, make_plan, template_store
from pytest_chvm.machine.vm import Snapshot, Vm
from pytest_chvm.model import LAUNCH_FIELDS, VmConfig, VmState, check_argument_names
from pytest_chvm.model.arguments import VmArguments
from pytest_chvm.settings import Settings

if TYPE_CHECKING:
    from pytest_chvm.guest.images.inspect import System
    from pytest_chvm.guest.kernels.kernel import Kernel


class Held(Protocol):
    """Something that a VM holds until it ends."""

    def release(self) -> list[str] | None:
        """Give it back; returns what could not be, in words, where it can tell."""


def launch(
    config: VmConfig | None = None,
    *,
    settings: Settings | None = None,
    wait: bool = True,
    owner: Owner | None = None,
    host: Host | None = None,
    longest_boot_s: float | None = None,
    **arguments: Unpack[VmArguments],
) -> Vm:
    """Boot a VM and return it when it is ready, or at once with `wait=False`; `with launch(...) as vm:` ends it.

    `arguments` are the fields of `VmConfig` (in place of those that `config` gives; see `VmConfig.given`) and of the launch: `vmm`,
    `accel`, `network`, `boot`, `boot_timeout` (seconds from the start of the VMM), `ready_marker`. What neither says is from
    `settings` (default: the environment). `owner` is told of the VM before it is waited for. `host` is what it is
    started for and ends with (default: this process's own). `longest_boot_s`: after which the boot fails, whatever the
    `boot_timeout`. Raises InvalidConfigError before anything is started, HostError where the host refuses what the VM needs,
    BootFailedError after; then nothing is left.
    """
    check_argument_names(arguments)
    host = host or default_host()
    given: dict[str, Any] = {**arguments}
    settings = (settings or Settings.resolve()).with_arguments({key: given.pop(key, None) for key in LAUNCH_FIELDS})
    # A value of None counts as not given.
    fields = {**(config.given() if config else {}), **{key: value for key, value in given.items() if value is not None}}
    if "name" not in fields:
        fields["name"] = f"vm{next(host.vm_numbers)}"
    config = VmConfig(**_defaults(settings, fields), **fields)
    inspect = partial(_inspected, settings, host)
    plan = make_plan(config, settings, host, wait=wait, longest_boot_s=longest_boot_s, inspect=inspect)
    return Launcher(host, owner).start(plan)


def _inspected(settings: Settings, host: Host, kernel: Callable[[], Kernel], config: VmConfig) -> tuple[System, Path]:
    # Few VMs have a stock image.
    from pytest_chvm.machine.inspection import inspected_system

    return inspected_system(settings, host, launch, kernel, config)


def _defaults(settings: Settings, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that the settings give; a root disk or initramfs is no default for a kernel named by the test."""
    defaults: dict[str, Any] = {"cpus": settings.cpus, "memory_mb": settings.memory_mb}
    # By firmware an image boots what is on it.
    if "firmware" not in fields:
        defaults["cmdline"] = settings.cmdline
        if settings.kernel:
            defaults["kernel"] = settings.kernel[0]
    if not {"initramfs", "root_disk", "root"} & fields.keys():
        defaults |= {"initramfs": None if "firmware" in fields else settings.initramfs, "root_disk": settings.root_disk}
    return {key: value for key, value in defaults.items() if key not in fields}


class Owner(Protocol):
    """Who is told of each VM and snapshot before it is waited for, and ends them; `end_with_caller` is for clones of snapshots."""

    def add_lease(self, lease: Lease) -> None:
        """Remember the record of what a VM, which is not there yet, has on the host."""

    def add_vm(self, vm: Vm) -> None:
        """End this VM with the others."""

    def add_snapshot(self, snapshot: Snapshot) -> None:
        """Remove this snapshot after the VMs."""

    def end_with_caller(self, vm: Vm) -> None:
        """End this VM at the end of the fixture that is being made, or of the test that runs."""

    def new_log(self, name: str) -> Path:
        """Return where the serial log of a VM goes."""


@dataclass(frozen=True, slots=True)
class Lent:
    """What the host lends a VM until it ends."""

    lease: Lease
    share: Share
    nics: Nics
    others: Sequence[Held]

    def release(self) -> list[str]:
        """Give all of it back; returns what could not be, in words."""
        held: Sequence[Held] = (self.share, *self.nics.held, *self.others, self.lease)
        return take_all([part.release for part in held])


@dataclass(frozen=True)
class Launcher:
    """Starts planned VMs on a host, for an owner (None: the caller ends them)."""

    host: Host
    owner: Owner | None = None

    def start(self, plan: Plan) -> Vm:
        """Start a VM as it was planned; one that was to be a clone is booted where it may be and cannot be cloned."""
        # Before a template is made, and before a VM is booted only because it could not be cloned.
        self.host.names.require_free(plan.guest.config)
        # It starts while a template is found, and libraries are imported.
        self.host.keeper()
        why, template = plan.why_cold, None
        if why is None:
            try:
                template = self._template(plan)
                return self._clone(plan, template.directory, held=[template])
            except VmError as error:
                # Where the template does not boot, neither would the VM.
                if plan.settings.boot == "clone" or (template is None and isinstance(error, BootFailedError | GuestPanicError)):
                    raise
                why = str(error)
                logger.warning("VM %r is booted, not cloned: %s", plan.guest.config.name, why)
        vm = self._cold(plan, why)
        if plan.why_cold == FIRST_OF_IMAGE:
            assert plan.image_parts is not None
            # Only of an image that gets ready: another's template would take just as long to fail.
            template_store(plan.settings, self.host).want(plan.image_parts)
        elif template is not None and not plan.guest.cloned_at_once:
            # Each further clone would be waited for as long as this one was.
            template.call_unfit(f"a clone of it failed, and then it booted: {why[:500]}")
        return vm

    def _cold(self, plan: Plan, why: str, *, template_dir: Path | None = None) -> Vm:
        """Boot a VM; `why` says why it is no clone."""
        return self._started(plan, Origin("cold", why), template_dir=template_dir)

    def _clone(self, plan: Plan, saved: Path, *, held: Sequence[Held] = (), stale_nics: int = 0) -> Vm:
        """Start a VM from a saved one, and have it made a machine of its own; `stale_nics` have the saved one's addresses."""
        guest = replace(plan.guest, config=clone_config(plan.guest.config), nonce=random_hex(8))
        return self._started(replace(plan, guest=guest), Origin("clone", "", saved, stale_nics), held=held)

    def _template(self, plan: Plan) -> HeldTemplate:
        """Return the template for a VM, from the store; the first call boots and saves it."""
        guest = plan.guest
        plain = guest.with_new_nonce(template_config(guest.config))

        def build(directory: Path) -> None:
            try:
                with self._cold(replace(plan, guest=plain, wait=True), "it is to be a template", template_dir=directory) as vm:
                    saving.save(vm.machine, directory, go_on=False)
                    if any(disk.kind.throwaway for disk in plain.config.all_disks):
                        _end_of_disk(vm, directory)
                if plan.made_of(identify) != parts:
                    raise HostError(f"VM {guest.config.name!r}: what its template is made of was changed while it was made")
            except (BootFailedError, GuestPanicError) as error:
                if guest.cloned_at_once or insists:
                    raise
                # It may boot in the surroundings that it is meant for.
                raise UnsupportedError(f"its template did not boot: {str(error)[:500]}") from error

        def identify(file: Path) -> str:
            return content_key(file, cache, self.host.show_progress)

        insists = plan.settings.boot == "clone"
        cache = cache_dir(plan.settings)
        parts = plan.made_of(identify)
        return template_store(plan.settings, self.host).get(parts, plain.config.memory_mb, build, try_again=insists)

    def _started(self, plan: Plan, origin: Origin, *, template_dir: Path | None = None, held: Sequence[Held] = ()) -> Vm:
        with ExitStack() as undo:
            lent = self._borrow(plan, origin, held, undo)
            machine = _boot(plan, origin, lent, template_dir, undo)
            vm = Vm(machine, snapshot=partial(self._snapshot, plan), release=lent.release)
            undo.pop_all()
        try:
            if self.owner is not None:
                self.owner.add_vm(vm)
            if origin.saved is not None:
                saving.renew(machine, plan.guest.words(plan.settings.ready_marker) + lent.nics.words)
            if plan.guest.config.gdb:
                self.host.show_progress(f"VM {vm.name} waits for a debugger: {shlex.join(vm.gdb_command)}")
            if plan.wait:
                vm.wait_ready()
        except BaseException:
            _close_quietly(vm)
            raise
        # Where the VM is not waited for, nobody sees when it is up.
        lent.share.booted()
        return vm

    def _borrow(self, plan: Plan, origin: Origin, held: Sequence[Held], undo: ExitStack) -> Lent:
        """Take what a VM needs from the host; `undo` gives it back, and `held` too."""
        config, settings = plan.guest.config, plan.settings
        for part in held:
            undo.callback(part.release)
        lease = Lease(self.host)
        undo.callback(_log_failures, lease.release)
        if self.owner is not None:
            self.owner.add_lease(lease)
        lease.describe(name=config.name, vmm=plan.driver.vmm, cpus=config.processors, memory_mb=config.memory_mb)
        budget = budget_of(settings.memory_budget_mb, settings.max_vms)
        boots_with = config.processors if origin.saved is None else 0
        share = take_share(budget, config.memory_mb, boots_with, lease, config.name, self.host.show_progress)
        undo.callback(share.release)
        return Lent(lease, share, lease_nics(config, plan.network, settings, lease, undo), held)

    def _snapshot(self, plan: Plan, machine: Machine) -> Snapshot:
        is_clone = machine.origin.boot == "clone"
        why = plan.why_no_clone or why_no_snapshot(plan.guest.config, plan.driver, machine.plugged, is_clone=is_clone)
        if why is None and plan.driver.state(machine.handle).state is VmState.PAUSED:
            why = "it is paused: resume() it first"
        elif why is None and machine.resized:
            why = "it was resized, and a clone would have to be too"
        if why is not None:
            raise UnsupportedError(f"VM {machine.name!r} cannot be saved: {why}", vm_name=machine.name)
        lease = Lease(self.host)
        if self.owner is not None:
            self.owner.add_lease(lease)
        try:
            directory = new_directory(snapshots_dir(cache_dir(plan.settings)), lease)
            saving.save(machine, directory)
        except BaseException as error:
            _log_failures(lease.release)
            if isinstance(error, OSError) and not isinstance(error, VmError):
                raise HostError(
                    f"VM {machine.name!r} cannot be saved: {error}; free some space, or set CHVM_CACHE_DIR to a directory of yours",
                    vm_name=machine.name,
                ) from error
            raise
        # Cut, so that the name of a clone of a clone of a clone is still a valid one.
        names = (f"{machine.name[:50]}-clone{number}" for number in self.host.clone_numbers)
        start = partial(self._clone_of_snapshot, plan, len(machine.config.networks or ()))
        snapshot = Snapshot(names, directory, start, lease.release)
        if self.owner is not None:
            self.owner.add_snapshot(snapshot)
        return snapshot

    def _clone_of_snapshot(self, plan: Plan, stale_nics: int, name: str, saved: Path, wait: bool) -> Vm:
        config = plan.guest.config.replace(name=name)
        log = config.serial_log and config.serial_log.with_name(f"{name}.serial.log")
        if self.owner is not None:
            log = self.owner.new_log(name)
        config = config.replace(serial_log=log)
        # The host may have changed since the VM that was saved was planned.
        preflight(config)
        self.host.names.require_free(config)
        clone = self._clone(replace(plan, guest=replace(plan.guest, config=config), wait=wait), saved, stale_nics=stale_nics)
        if self.owner is not None:
            self.owner.end_with_caller(clone)
        return clone


def _boot(plan: Plan, origin: Origin, lent: Lent, template_dir: Path | None, undo: ExitStack) -> Machine:
    guest, settings, driver = plan.guest, plan.settings, plan.driver
    told = guest.boot_words(settings.ready_marker, lent.nics.words)
    config = told_config(guest, told, lent.lease.directory).replace(networks=lent.nics.attachments)
    snapshots = snapshots_dir(cache_dir(settings))
    options = BootOptions(
        lent.lease,
        console=True,
        ready_marker=settings.ready_marker,
        nonce=guest.nonce,
        template_dir=template_dir,
        snapshots=snapshots if snapshots.is_dir() else None,
        restore_timeout_s=plan.boot_timeout_s,
        checked=True,
        modules_disk=guest.modules_disk,
    )
    boot_deadline = Deadline.after(plan.boot_timeout_s)
    handle = driver.boot(config, options) if origin.saved is None else driver.restore(config, origin.saved, options)
    undo.callback(driver.kill, handle)
    lent.lease.describe(events=os.fspath(handle.event_log))
    machine = Machine(config, handle, guest, origin, lent.lease, settings.virtiofsd, boot_deadline, driver)
    undo.callback(machine.close)
    return machine


def _end_of_disk(vm: Vm, directory: Path) -> None:
    """End a saved VM so that all of its root disk is in its file: Cloud Hypervisor writes the last of it when it ends.

    Raises UnsupportedError where it did not.
    """
    memory, kept = directory / MEMORY_FILE, directory / f"{MEMORY_FILE}.kept"
    # While it ends, its devices go on and write to the guest's memory.
    with kept.open("xb") as file:
        copy_sparse(memory, file.fileno())
    vm.stop()
    kept.rename(memory)
    check_was_closed(directory / ROOT_FILE)


def _log_failures(release: Callable[[], list[str]]) -> None:
    for failure in release():
        logger.error("left behind by a failed launch: %s", failure)


def _close_quietly(vm: Vm) -> None:
    try:
        vm.close()
    except StopFailedError as error:
        # The test must see the failed boot, not this.
        logger.error("%s", error)

"""The one place that turns a `VmConfig` into a ready `Vm` and back; usable without pytest."""

from __future__ import annotations

import itertools
import os
import platform
import re
import secrets
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pytest_chvm.deadline import Deadline
from pytest_chvm.drivers import choose_vmm, make_driver
from pytest_chvm.drivers.base import BootOptions, VmDriver, logger
from pytest_chvm.drivers.preflight import preflight
from pytest_chvm.errors import InvalidConfigError, StopFailedError, UnsupportedError, VmError
from pytest_chvm.guest.cache import default_cache_dir
from pytest_chvm.guest.initramfs import build_initramfs
from pytest_chvm.guest.kernel import Kernel, default_kernel, inspect_kernel
from pytest_chvm.guest.vmlinux import unpacked_kernel
from pytest_chvm.host import networks
from pytest_chvm.host.budget import Budget, Share, default_memory_mb, take_share
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.virtiofsd import find_virtiofsd
from pytest_chvm.model import (
    LAUNCH_FIELDS,
    NAME_PATTERN,
    Network,
    Tap,
    VmConfig,
    check_argument_names,
)
from pytest_chvm.settings import Settings
from pytest_chvm.vm import Vm

# For a kernel of the user's without a command line of theirs.
PLAIN_CMDLINE = "console=ttyS0"
# What a throwaway VM can do without, for the built-in kernel: console messages (the serial port is slow), guards against attacks
# from its own programs, looking for a timer that is known, tests of the crypto code, waiting long for grace periods.
BUILT_IN_CMDLINE = (
    "console=ttyS0 quiet mitigations=off nokaslr no_timer_check cryptomgr.notests rcupdate.rcu_expedited=1 random.trust_cpu=on"
)

_numbers = itertools.count(1)


def launch(
    config: VmConfig | None = None,
    *,
    settings: Settings | None = None,
    wait: bool = True,
    on_start: Callable[[Vm], None] | None = None,
    **arguments: Any,
) -> Vm:
    """Boot a VM and return it when it is ready, or at once with `wait=False`; `with launch(...) as vm:` ends it.

    `arguments` are the fields of `VmConfig` (in place of those of `config`) and of the launch: `vmm`, `accel`, `network`, `boot`,
    `boot_timeout` (seconds from the start of the VMM), `ready_marker`. What neither says is from `settings` (default: the
    environment). `on_start` is called with the VM before it is waited for. Raises InvalidConfigError before anything is started,
    BootFailedError after; then nothing is left.
    """
    check_argument_names(arguments)
    settings = (settings or Settings.resolve()).with_arguments({key: arguments.pop(key, None) for key in LAUNCH_FIELDS})
    # A value of None is one not given, but for a field that has a meaning for it.
    fields = {key: value for key, value in arguments.items() if value is not None}
    if config is None:
        fields.setdefault("name", f"vm{next(_numbers)}")
    config = (config or VmConfig(**_defaults(settings, fields))).replace(**fields)
    driver = driver_for(settings)
    guest = choose_guest(config, settings)
    preflight(guest.config)
    if settings.boot == "clone":
        raise UnsupportedError(f"VM {config.name!r}: VMs cannot be cloned yet: use boot='auto' or 'cold'", vm_name=config.name)
    driver.binary()
    if config.shared_dirs:
        find_virtiofsd(settings.virtiofsd)
    with ExitStack() as undo:
        vm = _start(guest, driver, settings, undo)
        undo.pop_all()
    try:
        if on_start is not None:
            on_start(vm)
        if wait:
            vm.wait_ready()
    except BaseException:
        _close_quietly(vm)
        raise
    return vm


def _defaults(settings: Settings, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that the settings give; a root disk or initramfs is no default for a kernel named by the test."""
    defaults: dict[str, Any] = {"cpus": settings.cpus, "memory_mb": settings.memory_mb, "cmdline": settings.cmdline}
    if settings.kernel:
        defaults["kernel"] = settings.kernel[0]
    if "initramfs" not in fields and "root_disk" not in fields:
        defaults |= {"initramfs": settings.initramfs, "root_disk": settings.root_disk}
    return {key: value for key, value in defaults.items() if key not in fields}


def driver_for(settings: Settings) -> VmDriver:
    """Return the driver that the settings choose; made once for each choice."""
    return _driver(settings.vmm, settings.accel, settings.binary, settings.virtiofsd, os.environ.get("PATH", ""))


@lru_cache(maxsize=16)
def _driver(vmm: str, accel: str, binary: Path | None, virtiofsd: Path | None, _path: str) -> VmDriver:
    if vmm == "auto":
        vmm, _why = choose_vmm(accel=accel, binary=binary)
    return make_driver(vmm, accel=accel, binary=binary, virtiofsd=virtiofsd)


@dataclass(frozen=True, slots=True)
class Guest:
    """What is booted: a complete config, and the nonce its ready line must have (None: it is not our guest)."""

    config: VmConfig
    nonce: str | None


def choose_guest(config: VmConfig, settings: Settings) -> Guest:
    """Fill in the built-in guest where the config names none: its kernel, and its initramfs for a kernel without a root.

    Raises InvalidConfigError where it cannot be built.
    """
    kernel = built_in_kernel(settings) if config.kernel is None else None
    if kernel is not None:
        config = config.replace(kernel=unpacked_kernel(kernel.image, cache_dir(settings)))
    if config.initramfs is not None or config.root_disk is not None:
        return Guest(config, None)
    preflight(config)
    assert config.kernel is not None
    initramfs = _built_in_initramfs(kernel or inspect_kernel(config.kernel), cache_dir(settings))
    cmdline = config.cmdline
    if cmdline is None:
        cmdline = PLAIN_CMDLINE if kernel is None else BUILT_IN_CMDLINE
    nonce = secrets.token_hex(8)
    words = [cmdline, f"chvm.nonce={nonce}", f"chvm.hostname={config.name.replace('_', '-').replace('.', '-')}"]
    if settings.ready_marker != "CHVM_READY":
        words.append(f"chvm.marker={settings.ready_marker}")
    words += [f"chvm.share={share.tag}{',ro' if share.read_only else ''}" for share in config.shared_dirs]
    return Guest(config.replace(initramfs=initramfs, cmdline=" ".join(words)), nonce)


def cache_dir(settings: Settings) -> Path:
    """Return where built guests and fetched kernels are kept."""
    return settings.cache_dir or default_cache_dir()


def built_in_kernel(settings: Settings) -> Kernel:
    """Return the built-in guest's kernel, fetched at the first call; raises InvalidConfigError where there is none."""
    return _built_in_kernel(cache_dir(settings))


@lru_cache(maxsize=4)
def _built_in_kernel(cache: Path) -> Kernel:
    return default_kernel(cache, platform.machine(), show_progress)


@lru_cache(maxsize=16)
def _built_in_initramfs(kernel: Kernel, cache: Path) -> Path:
    return build_initramfs(kernel, cache, show_progress)


def show_progress(text: str) -> None:
    """Tell the person at the terminal what takes long just now."""
    logger.info("%s", text)
    # The descriptor that pytest does not capture: what takes half a minute must not be silent.
    stream = sys.__stderr__
    if stream is not None:
        stream.write(f"pytest-chvm: {text}\n")
        stream.flush()


def _start(guest: Guest, driver: VmDriver, settings: Settings, undo: ExitStack) -> Vm:
    lease = Lease()
    undo.callback(_log_failures, lease.release)
    budget = Budget(settings.memory_budget_mb or default_memory_mb(), settings.max_vms)
    share = take_share(budget, guest.config.memory_mb, lease, guest.config.name, show_progress)
    undo.callback(share.release)
    config, held = _with_networks(guest, driver, settings, lease, undo)
    handle = driver.boot(config, BootOptions(lease, True, settings.ready_marker, guest.nonce))
    undo.callback(driver.kill, handle)
    return Vm(
        config,
        handle,
        driver,
        boot_deadline=Deadline.after(settings.boot_timeout),
        nonce_required=guest.nonce is not None,
        lease=lease,
        virtiofsd=settings.virtiofsd,
        release=lambda: _release([share, *held]),
    )


def _release(held: Sequence[networks.Subnet | Share]) -> list[str]:
    failures = []
    for part in held:
        try:
            part.release()
        except OSError as error:
            failures.append(f"{part}: {error}")
    return failures


def _log_failures(release: Callable[[], list[str]]) -> None:
    for failure in release():
        logger.error("left behind by a failed launch: %s", failure)


def _close_quietly(vm: Vm) -> None:
    try:
        vm.close()
    except StopFailedError as error:
        # The failed boot is what the test is to see.
        logger.error("%s", error)


def network_mode(settings: Settings, driver: VmDriver) -> tuple[str, str]:
    """Return the kind of network a VM gets, `tap`, `user` or `none`, and why."""
    if settings.network != "auto":
        return settings.network, "asked for"
    reason = networks.why_no_taps()
    if reason is None:
        return "tap", "TAPs can be made here"
    if driver.vmm == "qemu":
        return "user", f"no TAP can be made: {reason}"
    return "none", f"no TAP can be made: {reason}; {driver.vmm} has no user mode"


def _with_networks(
    guest: Guest, driver: VmDriver, settings: Settings, lease: Lease, undo: ExitStack
) -> tuple[VmConfig, list[networks.Subnet]]:
    """Take what the VM's networks need from the host, and tell the built-in guest its addresses."""
    config = guest.config
    wanted: list[Any] = list(config.networks) if config.networks is not None else _default_network(config, driver, settings)
    pool = networks.parse_pool(settings.subnet_pool)
    held: list[networks.Subnet] = []
    attached = []
    words = []
    for index, network in enumerate(wanted):
        address = None
        if isinstance(network, Tap):
            nic, subnet = networks.lease_tap_nic(lease, network, pool, config.netns)
        elif network == "user":
            nic, subnet = networks.lease_user_nic(lease, pool)
        elif isinstance(network, Network):
            nic, subnet = networks.lease_network_nic(lease, network), None
        else:
            attached.append(network)
            continue
        if subnet is not None:
            held.append(subnet)
            undo.callback(subnet.release)
        attached.append(nic.attachment)
        address = nic.address
        if address is not None:
            words.append(f"chvm.net=eth{index},{address.address},{address.gateway or ''}")
            if len(words) == 1:
                words.insert(0, f"chvm.ip={address.address.ip}")
    cmdline = config.cmdline
    if guest.nonce is not None or cmdline is not None:
        cmdline = " ".join([cmdline or "", *words]).strip()
    return config.replace(networks=attached, cmdline=cmdline), held


def _default_network(config: VmConfig, driver: VmDriver, settings: Settings) -> list[Any]:
    mode, _why = network_mode(settings, driver)
    if mode == "user":
        if driver.vmm != "qemu":
            raise UnsupportedError(
                f"{driver.vmm} has no user-mode network: use tap or none, or --chvm-vmm=qemu", vm_name=config.name
            )
        if config.netns is not None:
            raise InvalidConfigError(
                f"VM {config.name!r}: netns goes with a TAP, not with the user-mode network", vm_name=config.name
            )
    networks_of: dict[str, list[Any]] = {"tap": [Tap()], "user": ["user"], "none": []}
    return networks_of[mode]


class VmFactory:
    """What the fixtures give: called like `launch`, it ends all its VMs and networks when it is closed.

    `defaults` are arguments of every call (a marker's); logs go below `log_dir`. VMs without a name get `name` and a number. No
    boot is waited for longer than `longest_boot_s`, whoever asks for more.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        name: str,
        namespace: str,
        log_dir: Callable[[], Path],
        defaults: dict[str, Any] | None = None,
        longest_boot_s: float | None = None,
    ) -> None:
        self.settings = settings
        self.vms: list[Vm] = []
        self._networks: list[networks.LeasedNetwork] = []
        self._name = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")[:50] or "vm"
        self._namespace = namespace
        self._log_dir = log_dir
        self._defaults = defaults or {}
        self._longest_boot_s = longest_boot_s
        self._count = itertools.count(1)
        self.closed = False

    def __call__(self, config: VmConfig | None = None, **arguments: Any) -> Vm:
        """Boot a VM; see `launch`."""
        check_argument_names(arguments)
        given = {**(self._defaults if config is None else {}), **arguments}
        if config is None:
            number = next(self._count)
            given.setdefault("name", self._name if number == 1 else f"{self._name}-{number}")
            given.setdefault("namespace", self._namespace)
        if given.get("serial_log") is None and (config is None or config.serial_log is None):
            name = given.get("name", config.name if config else "")
            # A name that is none is for VmConfig to refuse.
            if isinstance(name, str) and NAME_PATTERN.fullmatch(name):
                given["serial_log"] = self._log_dir() / f"{name}.serial.log"
        settings = self.settings.with_arguments({"boot_timeout": given.pop("boot_timeout", None)})
        if self._longest_boot_s is not None and settings.boot_timeout > self._longest_boot_s:
            settings = settings.with_arguments({"boot_timeout": self._longest_boot_s})
        return launch(config, settings=settings, on_start=self.vms.append, **given)

    def network(self, name: str | None = None) -> Network:
        """Make an isolated network for several VMs; see `host.networks.lease_network`."""
        leased = networks.lease_network(networks.parse_pool(self.settings.subnet_pool), name)
        self._networks.append(leased)
        return leased.network

    def close(self) -> None:
        """End all VMs, at once, then the networks; raises StopFailedError with everything that is left."""
        failures: list[str] = []
        self.closed = True

        def end(vm: Vm) -> None:
            try:
                vm.close()
            except VmError as error:
                failures.append(str(error))

        threads = [threading.Thread(target=end, args=(vm,)) for vm in self.vms[1:]]
        try:
            for thread in threads:
                thread.start()
            for vm in self.vms[:1]:
                end(vm)
        finally:
            for thread in threads:
                thread.join()
            for network in self._networks:
                failures += network.close()
        if failures:
            raise StopFailedError("; ".join(failures))

"""`Plan`: all that is decided of a VM before it is started, each question asked once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pytest_chvm.clones.digests import file_identity
from pytest_chvm.clones.store import TemplateStore
from pytest_chvm.clones.templates import made_of, why_no_clone
from pytest_chvm.clones.truth import why_booted
from pytest_chvm.drivers import choose_vmm, make_driver
from pytest_chvm.drivers.base import BootsFirmware, Saves, VmDriver, check_abilities, logger
from pytest_chvm.errors import HostError, UnsupportedError, VmError
from pytest_chvm.guest.kinds import Guest
from pytest_chvm.host.host import Host, default_host
from pytest_chvm.host.limits import processors
from pytest_chvm.machine.guest_choice import InspectBy, cache_dir, choose_guest
from pytest_chvm.machine.nics import check_networks, network_mode
from pytest_chvm.model import Architecture, VmConfig
from pytest_chvm.settings import Settings

FIRST_OF_IMAGE = "it is the first of its image: the next ones are clones"

# With more processors than this for each of the host's, a VM mostly waits for itself.
OVERCOMMIT = 4
DEBUGGER_TIMEOUT_S = 86400.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a VM is to be, and how it comes to be; this host was found to have all of it.

    `network`: what it is on where its config names no networks, "tap", "user" or "none". `why_no_clone`: why there can be no
    clones of its kind, None where there can. `why_cold`: why it is booted, None where it is to be a clone. `image_parts`: what
    the template of an image is made of, its files by their identity. `wait`: it is waited for, for `boot_timeout_s`.
    """

    guest: Guest
    driver: VmDriver
    settings: Settings
    network: str
    wait: bool
    boot_timeout_s: float
    why_no_clone: str | None
    why_cold: str | None = None
    image_parts: Mapping[str, object] | None = None

    def made_of(self, identify: Callable[[Path], str]) -> dict[str, object]:
        """Return what its template is made of, of a kind that can be cloned; raises HostError where a file cannot be read."""
        assert isinstance(self.driver, Saves)
        try:
            return made_of(self.guest, self.driver, identify, network_mode=self.network, ready_marker=self.settings.ready_marker)
        except OSError as error:
            name = self.guest.config.name
            raise HostError(f"VM {name!r} cannot be a clone: {error}", vm_name=name) from error


def make_plan(
    config: VmConfig,
    settings: Settings,
    host: Host,
    *,
    wait: bool = True,
    longest_boot_s: float | None = None,
    inspect: InspectBy | None = None,
) -> Plan:
    """Return the plan of a VM; nothing is started, but a kernel may be fetched and an initramfs built.

    Raises InvalidConfigError, MissingRequirementError or HostError for the first thing that it cannot have, and
    UnsupportedError where it is to be a clone and cannot be one.
    """
    driver = driver_for(settings, host, config.architecture)
    if not config.architecture.is_host:
        # Before a kernel is fetched for it.
        driver.binary()
    if config.seed_texts or config.firmware is not None:
        from pytest_chvm.machine.seeds import with_seed

        config = with_seed(config, cache_dir(settings), host)
    guest = choose_guest(config, settings, host.show_progress, inspect=inspect)
    config = guest.config
    driver.binary()
    check_abilities(driver, config, guest.kernel)
    if config.firmware is not None:
        assert isinstance(driver, BootsFirmware)
        driver.firmware()
    if config.shared_dirs:
        from pytest_chvm.host.virtiofsd import find_virtiofsd

        find_virtiofsd(settings.virtiofsd).check(config.shared_dirs)
    if config.processors > OVERCOMMIT * processors():
        logger.warning("VM %r has %d processors, and the host %d: it will be slow", config.name, config.processors, processors())
    network, _why = network_mode(settings, driver, outbound=config.outbound)
    check_networks(config, network, driver)
    boot_timeout_s = _boot_timeout_s(guest, settings, longest_boot_s)
    no_clone = why_no_clone(guest, driver, network_mode=network)
    plan = Plan(guest, driver, settings, network, wait and config.gdb != "wait", boot_timeout_s, no_clone)
    plan = _boot_or_clone(plan, template_store(settings, host))
    if plan.why_cold is not None and settings.boot == "clone":
        raise UnsupportedError(
            f"VM {config.name!r} cannot be a clone: {plan.why_cold}; use boot='auto' or 'cold'", vm_name=config.name
        )
    return plan


def _boot_timeout_s(guest: Guest, settings: Settings, longest_s: float | None) -> float:
    """Return how long a boot may take: as was said, and where nothing was as such a guest takes; no longer than `longest_s`.

    One that a debugger is waited for has a day: a person sits there.
    """
    if guest.config.gdb == "wait":
        return DEBUGGER_TIMEOUT_S
    said_s = settings.boot_timeout
    timeout_s = guest.boot_timeout_s if said_s == Settings().boot_timeout else said_s
    return timeout_s if longest_s is None else min(timeout_s, longest_s)


def _boot_or_clone(plan: Plan, store: TemplateStore) -> Plan:
    """Return the plan with why it is booted, and what its image's template is made of, where it is to be asked for that."""
    boot = plan.settings.boot
    if boot == "cold":
        return replace(plan, why_cold="asked for")
    why = plan.why_no_clone or why_booted(plan.guest)
    if why is not None or plan.guest.cloned_at_once:
        return replace(plan, why_cold=why)
    if not plan.wait:
        return replace(plan, why_cold="it is an image of its own, whose boot is not waited for")
    try:
        # Not by content, which takes long for an image: most are used only once.
        parts = plan.made_of(file_identity)
    except VmError as error:
        return replace(plan, why_cold=str(error))
    if boot == "clone":
        store.want(parts)
    elif not store.wanted_before(parts):
        return replace(plan, why_cold=FIRST_OF_IMAGE, image_parts=parts)
    return replace(plan, image_parts=parts)


def template_store(settings: Settings, host: Host) -> TemplateStore:
    """Return the store of templates that the settings name."""
    return TemplateStore(cache_dir(settings), host.show_progress)


def driver_for(settings: Settings, host: Host | None = None, arch: Architecture | None = None) -> VmDriver:
    """Return the driver that the settings choose, for VMs of a host and of an architecture.

    By default it is this process's host, and this machine's architecture. It is made once for each choice.
    """
    host = host or default_host()
    other = None if arch is None or arch.is_host else arch.name
    key = (other, settings.vmm, settings.accel, settings.binary, settings.virtiofsd, os.environ.get("PATH", ""))
    if key not in host.drivers:
        vmm = settings.vmm
        if vmm == "auto":
            vmm, _why = choose_vmm(accel=settings.accel, binary=settings.binary, arch=other)
        chosen: dict[str, Any] = {"accel": settings.accel, "binary": settings.binary, "virtiofsd": settings.virtiofsd}
        host.drivers[key] = make_driver(vmm, **chosen, host=host, arch=other)
    driver: VmDriver = host.drivers[key]
    return driver

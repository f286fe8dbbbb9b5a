"""Devices, processors and memory that come and go while a VM runs: what `Vm`'s methods of those names do."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from pytest_chvm.drivers.base import Plugs
from pytest_chvm.drivers.images import check_disk
from pytest_chvm.errors import InvalidConfigError, UnsupportedError
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.networks import interface_exists, make_tap
from pytest_chvm.host.processes import end_process
from pytest_chvm.host.virtiofsd import PROGRAMS, ServedShare, check_shared_dir, find_virtiofsd, serve_share
from pytest_chvm.model import ProcessIdentity, SharedDir, Tap, VmConfig, VmHandle, checked_mac, mac_for

SIDECAR_TIMEOUT_S = 1.0
# Of the NICs that a VM has from its boot on there are fewer.
FIRST_PLUGGED_NIC = 100


@dataclass(frozen=True, slots=True)
class Device:
    """A device that was plugged in; `id` is the VMM's name for it."""

    id: str
    kind: str
    tap: str | None = None
    mac: str | None = None
    served: ServedShare | None = None

    @property
    def sidecar(self) -> ProcessIdentity | None:
        """The virtiofsd of a shared dir."""
        return self.served.process if self.served else None


def require_room(config: VmConfig) -> None:
    """Raise UnsupportedError where a VM was booted without room for devices."""
    if not config.hotplug:
        raise UnsupportedError(f"VM {config.name!r} has no room for devices: boot it with hotplug=True", vm_name=config.name)


def add_disk(driver: Plugs, handle: VmHandle, image: Path, *, read_only: bool) -> Device:
    """Plug a disk in; the guest's writes stay on it unless it is read-only. Raises InvalidConfigError where there is no image."""
    if not image.is_file():
        raise InvalidConfigError(f"VM {handle.name!r}: the disk {str(image)!r} does not exist, or is no file", vm_name=handle.name)
    try:
        # One that is only read may be any image, as a root disk is.
        check_disk("root_disk" if read_only else "data_disk", image)
    except InvalidConfigError as error:
        raise InvalidConfigError(f"VM {handle.name!r}: {error}", vm_name=handle.name) from None
    return Device(driver.add_disk(handle, image, read_only=read_only), "disk")


def add_tap(driver: Plugs, handle: VmHandle, lease: Lease, tap: Tap, plugged: Collection[Device]) -> tuple[Device, VmHandle]:
    """Plug a NIC in; a TAP that is not there is made, and removed with the VM. Returns the handle that knows of it.

    Without a MAC of its own it gets the first one made of the VM's name that none of the `plugged` devices has.
    """
    taken = {device.mac for device in plugged}
    made = (mac_for(handle.name, index) for index in itertools.count(FIRST_PLUGGED_NIC))
    mac = checked_mac(tap.mac) if tap.mac else next(mac for mac in made if mac not in taken)
    name, ours = tap.name, tap.take_over
    if name is None or not interface_exists(name, handle.netns):
        name, ours = make_tap(lease, name, None, handle.netns), True
    elif ours:
        lease.add_tap(name, handle.netns)
    if ours:
        handle = replace(handle, taps=(*handle.taps, name))
    return Device(driver.add_tap(handle, name, mac), "nic", tap=name, mac=mac), handle


def add_share(driver: Plugs, handle: VmHandle, lease: Lease, share: SharedDir, virtiofsd: Path | None) -> tuple[Device, VmHandle]:
    """Plug a shared dir in, with a virtiofsd of its own. Returns the handle that knows of it."""
    check_shared_dir(share)
    program = find_virtiofsd(virtiofsd)
    path = next(path for number in itertools.count() if not (path := lease.directory / f"fs-{number}.sock").exists())
    served = serve_share(program, share, path, lease.host, lease)
    try:
        device = driver.add_share(handle, share, path)
    except BaseException:
        _end(served)
        raise
    return Device(device, "fs", served=served), replace(handle, sidecars=(*handle.sidecars, served.process))


def remove(driver: Plugs, handle: VmHandle, device: Device) -> None:
    """Unplug a device; its virtiofsd ends with it, its TAP stays until the VM ends."""
    driver.remove_device(handle, device.id)
    if device.served is not None:
        _end(device.served)


def _end(served: ServedShare) -> None:
    end_process(served.process, PROGRAMS, term_timeout_s=SIDECAR_TIMEOUT_S, kill_timeout_s=SIDECAR_TIMEOUT_S)

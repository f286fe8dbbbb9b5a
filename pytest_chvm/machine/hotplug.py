"""Devices, processors and memory that come and go while a VM runs: what `Vm`'s methods of those names do."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

from pytest_chvm.drivers.images import check_disk
from pytest_chvm.errors import InvalidConfigError, UnsupportedError
from pytest_chvm.host.networks.tap import interface_exists, make_tap
from pytest_chvm.host.processes import end_process
from pytest_chvm.host.virtiofsd import PROGRAMS, check_shared_dir, find_virtiofsd, serve_share
from pytest_chvm.machine.device import Device
from pytest_chvm.machine.events import PLUGGED, UNPLUGGED
from pytest_chvm.machine.machine import Machine
from pytest_chvm.model import DATA, ROOT, ServedShare, SharedDir, Tap, VmDisk, checked_mac, mac_for

SIDECAR_TIMEOUT_S = 1.0
# Higher than the number of any NIC that a VM has from its boot on.
FIRST_PLUGGED_NIC = 100


def add_disk(machine: Machine, image: Path, *, read_only: bool) -> Device:
    """Plug a disk in; the guest's writes stay on it unless it is read-only. Raises InvalidConfigError where there is no image."""
    _require_room(machine)
    if not image.is_file():
        raise InvalidConfigError(
            f"VM {machine.name!r}: the disk {str(image)!r} does not exist, or is no file", vm_name=machine.name
        )
    try:
        # A disk that is only read may have any format, as a root disk may.
        check_disk(VmDisk(ROOT if read_only else DATA, image))
    except InvalidConfigError as error:
        raise InvalidConfigError(f"VM {machine.name!r}: {error}", vm_name=machine.name) from None
    with machine.modules_put_away():
        device = machine.driver.add_disk(machine.handle, image, read_only=read_only)
    return _plugged_in(machine, Device(device, "disk"))


def add_network(machine: Machine, tap: Tap) -> Device:
    """Plug a NIC in; a TAP that is not there is made, and removed with the VM.

    Without a MAC of its own it gets the first one made of the VM's name that no plugged device has.
    """
    _require_room(machine)
    if not machine.config.outbound:
        raise UnsupportedError(f"VM {machine.name!r} gets no TAP: it has outbound=False", vm_name=machine.name)
    handle, lease = machine.handle, machine.lease
    taken = {device.mac for device in machine.plugged.values()}
    made = (mac_for(handle.name, index) for index in itertools.count(FIRST_PLUGGED_NIC))
    mac = checked_mac(tap.mac) if tap.mac else next(mac for mac in made if mac not in taken)
    name, ours = tap.name, tap.take_over
    if name is None or not interface_exists(name, handle.netns):
        name, ours = make_tap(lease, name, None, handle.netns), True
    elif ours:
        lease.add_tap(name, handle.netns)
    device = Device(machine.driver.add_tap(handle, name, mac), "nic", tap=name, mac=mac)
    if ours:
        machine.handle = replace(handle, taps=(*handle.taps, name))
    return _plugged_in(machine, device)


def add_shared_dir(machine: Machine, share: SharedDir) -> Device:
    """Plug a shared dir in, with a virtiofsd of its own, whose unexpected end is an error from now on."""
    _require_room(machine)
    device = plug_share(machine, share)
    assert device.served is not None
    machine.health.shares.append(device.served)
    return _plugged_in(machine, device)


def remove(machine: Machine, device: Device) -> None:
    """Unplug a device that was plugged in; its virtiofsd ends with it, its TAP stays until the VM ends."""
    health = machine.health
    before = health.shares
    if device.served is not None:
        # After a reboot another virtiofsd serves it. Its end is no error from now on.
        now = [each for each in before if each.socket == device.served.socket]
        health.shares = [each for each in before if each not in now]
        device = replace(device, served=now[0] if now else device.served)
    try:
        unplug(machine, device)
    except BaseException:
        health.shares = before
        raise
    machine.plugged.pop(device.id, None)
    machine.log.add(UNPLUGGED, id=device.id, device=device.kind)


def plug_share(machine: Machine, share: SharedDir) -> Device:
    """Start a virtiofsd and plug its shared dir in; nothing is recorded of the device."""
    check_shared_dir(share)
    program, lease = find_virtiofsd(machine.virtiofsd), machine.lease
    path = next(path for number in itertools.count() if not (path := lease.directory / f"fs-{number}.sock").exists())
    served = serve_share(program, share, path, lease.host, lease)
    try:
        device = machine.driver.add_share(machine.handle, share, path)
    except BaseException:
        _end(served)
        raise
    machine.handle = replace(machine.handle, sidecars=(*machine.handle.sidecars, served.process))
    return Device(device, "fs", served=served)


def unplug(machine: Machine, device: Device) -> None:
    """Unplug a device and end its virtiofsd; nothing is recorded."""
    machine.driver.remove_device(machine.handle, device.id)
    if device.served is not None:
        _end(device.served)


def _require_room(machine: Machine) -> None:
    if not machine.config.hotplug:
        raise UnsupportedError(f"VM {machine.name!r} has no room for devices: boot it with hotplug=True", vm_name=machine.name)


def _plugged_in(machine: Machine, device: Device) -> Device:
    machine.plugged[device.id] = device
    machine.log.add(PLUGGED, id=device.id, device=device.kind)
    return device


def _end(served: ServedShare) -> None:
    end_process(served.process, PROGRAMS, term_timeout_s=SIDECAR_TIMEOUT_S, kill_timeout_s=SIDECAR_TIMEOUT_S)

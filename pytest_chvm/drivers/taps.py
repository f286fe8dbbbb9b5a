"""The TAPs of a VM that is booted: existing ones, and those that are made for it."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_chvm.drivers.boot import Boot
from pytest_chvm.host.networks.tap import interface_exists, make_tap
from pytest_chvm.model import Tap, mac_for


@dataclass(frozen=True, slots=True)
class AttachedTap:
    """A TAP that is there, for the VM's NIC number `index`; `ours` is removed with the VM."""

    index: int
    name: str
    mac: str
    ours: bool


def taps_of(boot: Boot) -> list[AttachedTap]:
    """Return the TAPs of a VM, in order; one that is not there yet is made, in the lease first."""
    config = boot.config
    taps = []
    for index, network in enumerate(config.networks or ()):
        if isinstance(network, Tap):
            name, ours = network.name, network.take_over
            if name is None or not interface_exists(name, config.netns):
                name, ours = make_tap(boot.lease, name, None, config.netns), True
            elif ours:
                boot.lease.add_tap(name, config.netns)
            if ours:
                boot.taps_to_remove.append(name)
            taps.append(AttachedTap(index, name, network.mac or mac_for(config.name, index), ours))
    return taps

"""Which network a VM gets, and what its NICs need from the host."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from pytest_chvm.drivers.base import VmDriver
from pytest_chvm.errors import InvalidConfigError, UnsupportedError
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.networks.isolated import lease_network_nic
from pytest_chvm.host.networks.nic import Need, Nic
from pytest_chvm.host.networks.subnets import Subnet, parse_pool
from pytest_chvm.host.networks.tap import lease_tap_nic, why_no_taps
from pytest_chvm.host.networks.user import lease_user_nic
from pytest_chvm.model import Attachment, Network, Tap, UserNetwork, VmConfig, mac_for
from pytest_chvm.settings import Settings


def network_mode(settings: Settings, driver: VmDriver, *, outbound: bool = True) -> tuple[str, str]:
    """Return the kind of network a VM gets, `tap`, `user` or `none`, and why; without `outbound` none on which it can reach out."""
    if settings.network != "auto":
        return settings.network, "asked for"
    if not outbound and driver.abilities.user_network:
        return "user", "outbound=False goes with no other"
    reason = why_no_taps()
    if reason is None:
        return "tap", "TAPs can be made here"
    if driver.abilities.user_network:
        return "user", f"no TAP can be made: {reason}"
    return "none", f"no TAP can be made: {reason}; {driver.vmm} has no user mode"


# For each kind of network, the function that takes what a NIC on it needs from the host. A user-mode network with given addresses
# needs nothing.
LEASES: dict[type, Callable[[Any, Need], Nic]] = {
    Tap: lease_tap_nic,
    Network: lease_network_nic,
    UserNetwork: lambda network, _need: Nic(network, is_told=False),
}


@dataclass(frozen=True, slots=True)
class Nics:
    """A VM's NICs: the attachments for the driver, the subnets held for them, and the words that tell the guest of them."""

    attachments: list[Attachment]
    held: list[Subnet]
    words: list[str]


def check_networks(config: VmConfig, mode: str, driver: VmDriver) -> None:
    """Raise UnsupportedError or InvalidConfigError where a VM cannot be on the networks that it would be on."""
    if config.networks is None and mode == "user":
        if not driver.abilities.user_network:
            raise UnsupportedError(
                f"{driver.vmm} has no user-mode network: use tap or none, or --chvm-vmm=qemu", vm_name=config.name
            )
        if config.netns is not None:
            raise InvalidConfigError(
                f"VM {config.name!r}: netns goes with a TAP, not with the user-mode network", vm_name=config.name
            )
    if not config.outbound and any(network.reaches_host for network in _attachments(config, mode)):
        raise UnsupportedError(
            f"VM {config.name!r}: outbound=False goes with the user-mode network (QEMU, network='user') or none: on a TAP or "
            "a bridge the host is the guest's neighbour",
            vm_name=config.name,
        )


def lease_nics(config: VmConfig, mode: str, settings: Settings, lease: Lease, undo: ExitStack) -> Nics:
    """Take what a VM's networks need from the host; `undo` gives it back. `mode`: see `network_mode`."""
    need = Need(lease, parse_pool(settings.subnet_pool), config.netns, config.outbound)
    nics = Nics([], [], [])
    leases = [partial(_leased, network, need) for network in _attachments(config, mode)]
    if config.networks is None and mode == "user":
        leases = [partial(lease_user_nic, need)]
    for index, lease_nic in enumerate(leases):
        nic = lease_nic()
        if nic.subnet is not None:
            nics.held.append(nic.subnet)
            undo.callback(nic.subnet.release)
        nics.attachments.append(nic.attachment)
        if nic.is_told:
            _tell(nics.words, index, nic, config.name)
    return nics


def _leased(network: Attachment, need: Need) -> Nic:
    return next(lease for kind, lease in LEASES.items() if isinstance(network, kind))(network, need)


def _tell(words: list[str], index: int, nic: Nic, vm_name: str) -> None:
    mac = nic.attachment.mac or mac_for(vm_name, index)
    address = nic.address
    if address is None:
        words.append(f"chvm.net=eth{index},,,{mac}")
        return
    if not any(word.startswith("chvm.ip=") for word in words):
        words.insert(0, f"chvm.ip={address.address.ip}")
    words.append(f"chvm.net=eth{index},{address.address.with_netmask},{address.gateway or ''},{mac}")


def _attachments(config: VmConfig, mode: str) -> list[Attachment]:
    """Return what a VM's NICs are to be attached to, but for the user-mode network of the mode, which is made for each VM."""
    if config.networks is not None:
        return list(config.networks)
    return [Tap()] if mode == "tap" else []

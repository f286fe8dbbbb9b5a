"""A VM's NIC: what its network is leased with, and what comes of that."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_chvm.host.leases import Lease
from pytest_chvm.host.networks.subnets import IPv4Net, Subnet
from pytest_chvm.model import Attachment, NicAddress


@dataclass(frozen=True, slots=True)
class Nic:
    """One NIC of a VM: what the driver attaches it to, and the address the guest is told (None: not ours to say).

    `subnet` is held for it until the VM ends. `is_told`: the guest is told that it has the NIC.
    """

    attachment: Attachment
    address: NicAddress | None = None
    subnet: Subnet | None = None
    is_told: bool = True


@dataclass(frozen=True, slots=True)
class Need:
    """What a NIC is leased with: the record of what is held for its VM, where subnets are from, and what its config says of it."""

    lease: Lease
    pool: IPv4Net
    netns: str | None = None
    outbound: bool = True

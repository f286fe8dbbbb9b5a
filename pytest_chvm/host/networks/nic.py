"""What a VM's NIC has become when its network has been leased."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_chvm.model import Network, NicAddress, Tap, UserNetwork


@dataclass(frozen=True, slots=True)
class Nic:
    """One NIC of a VM: what the driver attaches it to, and the address the guest is told (None: not ours to say)."""

    attachment: Tap | UserNetwork | Network
    address: NicAddress | None

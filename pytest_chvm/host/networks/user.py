"""The user-mode network of a VM: it needs nothing of the host's but a subnet that no other VM has."""

from __future__ import annotations

import ipaddress

from pytest_chvm.host.networks.nic import Need, Nic
from pytest_chvm.host.networks.subnets import POINT_TO_POINT_PREFIX, take_subnet
from pytest_chvm.model import NicAddress, UserNetwork


def lease_user_nic(need: Need) -> Nic:
    """Return a NIC on QEMU's user-mode network, with a subnet that no other VM of the machine has."""
    subnet = take_subnet(need.pool, POINT_TO_POINT_PREFIX, need.lease, of_the_host=False)
    guest = NicAddress(ipaddress.IPv4Interface((subnet.guest, POINT_TO_POINT_PREFIX)), subnet.host)
    return Nic(UserNetwork(subnet.network, subnet.host, subnet.guest, outbound=need.outbound), guest, subnet)

"""Networks of several VMs: a bridge of the host's, or multicast on loopback."""

from __future__ import annotations

import errno
import ipaddress
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from pytest_chvm.base.untouched import random_hex
from pytest_chvm.errors import HostError, InvalidConfigError, MissingRequirementError
from pytest_chvm.host.host import Host
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.netlink import Routes, route_socket
from pytest_chvm.host.networks.nic import Need, Nic
from pytest_chvm.host.networks.subnets import NETWORK_PREFIX, IPv4Net, Subnet, take_subnet
from pytest_chvm.host.networks.tap import make_tap, why_no_taps
from pytest_chvm.model import Network, NicAddress, Tap

ATTEMPTS = 5


def lease_network_nic(network: Network, need: Need) -> Nic:
    """Return a NIC on a network of several VMs, with the next address that none of them has had."""
    hosts = need.lease.host.next_addresses.setdefault(network, iter(list(network.subnet.hosts())[1:]))
    address = next(hosts, None)
    if address is None:
        raise InvalidConfigError(f"network {network.name!r} has no address left in {network.subnet}")
    guest = NicAddress(ipaddress.IPv4Interface((address, network.subnet.prefixlen)), network.subnet[1] if network.bridge else None)
    if network.bridge is None:
        return Nic(network, guest)
    return Nic(Tap(make_tap(need.lease, None, None, None, bridge=network.bridge), None, take_over=True), guest)


@dataclass
class LeasedNetwork:
    """A network of several VMs and what it holds of the host; `close` gives it back, after its VMs."""

    network: Network
    _lease: Lease
    _subnet: Subnet

    def close(self) -> list[str]:
        """Remove it; returns what could not be removed, in words."""
        self._lease.host.next_addresses.pop(self.network, None)
        try:
            return self._lease.release()
        finally:
            self._subnet.release()


def lease_network(
    host: Host, pool: IPv4Net, name: str | None = None, on_lease: Callable[[Lease], None] = lambda _lease: None
) -> LeasedNetwork:
    """Make an isolated network: a bridge of the host's where one can be made, else multicast on loopback (QEMU only).

    Raises HostError where the kernel refuses.
    """
    lease = Lease(host)
    try:
        on_lease(lease)
        has_bridge = why_no_taps() is None
        subnet = take_subnet(pool, NETWORK_PREFIX, lease, of_the_host=has_bridge)
        try:
            bridge = multicast = None
            if has_bridge:
                bridge = make_bridge(lease, ipaddress.IPv4Interface((subnet.host, NETWORK_PREFIX)))
            else:
                # A group of its own for each: the subnet is.
                multicast = f"239.{'.'.join(str(subnet.network.network_address).split('.')[1:])}:4700"
        except BaseException:
            subnet.release()
            raise
    except BaseException:
        lease.release()
        raise
    return LeasedNetwork(Network(name or f"net-{subnet.network.network_address}", subnet.network, bridge, multicast), lease, subnet)


def make_bridge(lease: Lease, address: ipaddress.IPv4Interface) -> str:
    """Make a bridge that is up and has an address of the host's; returns its name."""
    reason = why_no_taps()
    if reason:
        raise MissingRequirementError(f"no bridge can be made: {reason}")
    with route_socket(None) as route:
        name = _new_bridge(lease, route)
        index = route.link_lookup(ifname=name)[0]
        route.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)
        route.link("set", index=index, state="up")
    return name


def _new_bridge(lease: Lease, route: Routes) -> str:
    for attempt in itertools.count(1):
        name = f"chvmbr{random_hex(4)}"
        # A bridge stays from the moment it is there, so that it is in the lease before.
        lease.add_bridge(name)
        try:
            route.link("add", ifname=name, kind="bridge")
            return name
        except OSError as error:
            # Somebody else's then, if it is there at all.
            lease.forget_bridge(name)
            if error.errno != errno.EEXIST or attempt == ATTEMPTS:
                raise HostError(f"the bridge {name!r} cannot be made: {error}") from error
    raise AssertionError("unreachable")

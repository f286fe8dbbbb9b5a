"""Subnets: lent to one VM or network at a time, machine-wide.

A subnet is taken by locking a file in a directory common to all users; the lock ends with the process that
holds it. What is already routed on the host is never taken for a network that the host is to reach.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass

from pytest_chvm.base.untouched import random_below
from pytest_chvm.errors import InvalidConfigError, MissingRequirementError
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.locks import HeldLock
from pytest_chvm.host.netlink import route_socket

IPv4Net = ipaddress.IPv4Network

# For benchmarks of network devices (RFC 2544, RFC 6890): no site has it, so no route is hidden by it.
DEFAULT_POOL = "198.18.0.0/15"
PRIVATE_RANGES = tuple(ipaddress.IPv4Network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))  # RFC 1918
# Where that is routed: VPNs give names addresses of it. Of the private ranges, far from where sites and Docker begin to count.
FURTHER_POOLS = tuple(ipaddress.IPv4Network(text) for text in ("10.218.0.0/15", "172.30.0.0/15"))
POINT_TO_POINT_PREFIX = 30
NETWORK_PREFIX = 24


def parse_pool(text: str) -> IPv4Net:
    """Return the pool that VM subnets are cut from; raises InvalidConfigError where it is no usable network."""
    try:
        pool = ipaddress.IPv4Network(text)
    except ValueError as error:
        raise InvalidConfigError(f"subnet pool {text!r}: {error}; expected a network like {DEFAULT_POOL}") from error
    if pool.prefixlen > NETWORK_PREFIX - 2:
        raise InvalidConfigError(f"subnet pool {text!r} is too small: expected /{NETWORK_PREFIX - 2} or larger")
    return pool


@dataclass(frozen=True, slots=True)
class Subnet:
    """A subnet of the pool, held by a lock until `release`."""

    network: IPv4Net
    _lock: HeldLock

    @property
    def host(self) -> ipaddress.IPv4Address:
        """The host's address in it: the first."""
        return self.network[1]

    @property
    def guest(self) -> ipaddress.IPv4Address:
        """The guest's address in a point-to-point subnet: the second."""
        return self.network[2]

    def release(self) -> None:
        """Give it back."""
        self._lock.release()


def take_subnet(pool: IPv4Net, prefix: int, lease: Lease, netns: str | None = None, *, of_the_host: bool = True) -> Subnet:
    """Return a free subnet of the pool: locked by nobody, and `of_the_host`, claimed by no route of the host (or of `netns`).

    Point-to-point subnets are cut from the lower half of the pool, those of networks from the upper one. Where the default pool has
    none, as with a VPN that has its addresses there, others are tried. Raises MissingRequirementError where none is free.
    """
    routes = list(_routed(netns)) if of_the_host else []
    pools = [pool, *(FURTHER_POOLS if pool == ipaddress.IPv4Network(DEFAULT_POOL) else ())]
    for each in pools:
        lower, upper = each.subnets(prefixlen_diff=1)
        half = lower if prefix == POINT_TO_POINT_PREFIX else upper
        subnet = _take_from(half, prefix, lease, [route for route in routes if route.overlaps(half) and _claims(route, each)])
        if subnet is not None:
            return subnet
    raise MissingRequirementError(
        f"no /{prefix} subnet is free in the pool {' or '.join(map(str, pools))}: each is routed or in use; name another with "
        "CHVM_SUBNET_POOL"
    )


def _take_from(half: IPv4Net, prefix: int, lease: Lease, claims: list[IPv4Net]) -> Subnet | None:
    if any(half.subnet_of(claim) for claim in claims):
        return None
    count = 2 ** (prefix - half.prefixlen)
    # Not from the first on: that one's lock is the one every other process tries at this moment.
    first = random_below(count)
    for slot in range(count):
        base = int(half.network_address) + (first + slot) % count * 2 ** (32 - prefix)
        network = ipaddress.IPv4Network((base, prefix))
        if any(network.overlaps(claim) for claim in claims):
            continue
        try:
            lock = HeldLock(f"subnet-{network.network_address}-{prefix}.lock", lease, timeout_s=0)
        except (TimeoutError, PermissionError):
            continue
        return Subnet(network, lock)
    return None


def _claims(route: IPv4Net, pool: IPv4Net) -> bool:
    """Tell whether a route says that addresses of the pool are somebody's.

    A default route does not, and a VPN has a few in its place: 0.0.0.0/1 and 128.0.0.0/1, or all of the Internet but some. A site's
    networks are in the private ranges, the largest of which is a /8.
    """
    if route.prefixlen >= pool.prefixlen:
        return True
    return any(route.subnet_of(private) for private in PRIVATE_RANGES)


def _routed(netns: str | None) -> Iterator[IPv4Net]:
    with route_socket(netns) as route:
        for entry in route.get_routes(family=2):
            destination = entry.get_attr("RTA_DST")
            if destination and entry["dst_len"]:
                yield ipaddress.IPv4Network((destination, entry["dst_len"]), strict=False)

"""TAPs, subnets and bridges of the host: lent to one VM or network at a time, machine-wide.

A subnet is taken by locking a file in a directory common to all users; the lock ends with the process that
holds it. What is already routed on the host is never taken for a network that the host is to reach.
"""

from __future__ import annotations

import errno
import ipaddress
import itertools
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pytest_chvm.base.untouched import random_below, random_hex
from pytest_chvm.errors import HostError, InvalidConfigError, MissingRequirementError
from pytest_chvm.host.capabilities import missing
from pytest_chvm.host.host import Host
from pytest_chvm.host.keeper import remains
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.locks import HeldLock
from pytest_chvm.host.namespaces import inside
from pytest_chvm.host.netlink import Routes, route_socket
from pytest_chvm.model import Network, NicAddress, Tap, UserNetwork

IPv4Net = ipaddress.IPv4Network

# For benchmarks of network devices (RFC 2544, RFC 6890): no site has it, so no route is hidden by it.
DEFAULT_POOL = "198.18.0.0/15"
PRIVATE_RANGES = tuple(ipaddress.IPv4Network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))  # RFC 1918
# Where that is routed: VPNs give names addresses of it. Of the private ranges, far from where sites and Docker begin to count.
FURTHER_POOLS = tuple(ipaddress.IPv4Network(text) for text in ("10.218.0.0/15", "172.30.0.0/15"))
POINT_TO_POINT_PREFIX = 30
NETWORK_PREFIX = 24
# linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNSETPERSIST = 0x400454CB
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_TUN_EXCL = 0x0002, 0x1000, 0x4000, 0x8000
ATTEMPTS = 5


def parse_pool(text: str) -> IPv4Net:
    """Return the pool that VM subnets are cut from; raises InvalidConfigError where it is no usable network."""
    try:
        pool = ipaddress.IPv4Network(text)
    except ValueError as error:
        raise InvalidConfigError(f"subnet pool {text!r}: {error}; expected a network like {DEFAULT_POOL}") from error
    if pool.prefixlen > NETWORK_PREFIX - 2:
        raise InvalidConfigError(f"subnet pool {text!r} is too small: expected /{NETWORK_PREFIX - 2} or larger")
    return pool


def why_no_taps() -> str | None:
    """Return why this process cannot make TAPs, or None where it can."""
    if not os.path.exists("/dev/net/tun"):
        return "/dev/net/tun is not there"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun may not be opened"
    if missing(["CAP_NET_ADMIN"]):
        return "there is no CAP_NET_ADMIN"
    return _why_no_tap_in(os.fspath(Path("/proc/thread-self/ns/net").readlink()))


@lru_cache(maxsize=16)
def _why_no_tap_in(_network_namespace: str) -> str | None:
    """Return why no TAP can be made in this network namespace, by making one, or None where it can."""
    try:
        _name, fd = _new_tap(None, None)
    except HostError as error:
        # Root of a user namespace has all capabilities, but none over a network that is not of that namespace.
        return f"{error} (as root of a user namespace or container whose network is not its own?)"
    os.close(fd)
    return None


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


def interface_exists(name: str, netns: str | None) -> bool:
    """Tell whether an interface is there, in the host's or a named network namespace."""
    with inside(netns):
        return remains.interface_is_there(name, None)


def make_tap(
    lease: Lease, name: str | None, address: ipaddress.IPv4Interface | None, netns: str | None, bridge: str | None = None
) -> str:
    """Make a persistent TAP, up, with an address of the host's or in a bridge; returns its name.

    Only one that was not there before is in the lease. Raises HostError where the kernel refuses.
    """
    reason = why_no_taps()
    if reason:
        raise MissingRequirementError(f"no TAP can be made: {reason}; run as root, or use --chvm-network=user (QEMU) or none")
    import fcntl

    chosen, fd = _new_tap(name, netns)
    try:
        # Until then it goes with the descriptor, however this process ends.
        lease.add_tap(chosen, netns)
        fcntl.ioctl(fd, TUNSETPERSIST, 1)
        with route_socket(netns) as route:
            index = route.link_lookup(ifname=chosen)[0]
            if address is not None:
                route.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)
            if bridge is not None:
                route.link("set", index=index, master=route.link_lookup(ifname=bridge)[0])
            route.link("set", index=index, state="up")
    except OSError as error:
        raise HostError(f"the TAP {chosen!r} cannot be made: {error}") from error
    finally:
        os.close(fd)
    lease.host.started.add("TAP")
    return chosen


def _new_tap(name: str | None, netns: str | None) -> tuple[str, int]:
    """Return the name and the descriptor of a TAP that was not there before, and is there as long as the descriptor is."""
    import fcntl

    for attempt in itertools.count(1):
        # Not of the numbers that a test may have seeded, as another run's may have.
        chosen = name or f"chvm{random_hex(4)}"
        with inside(netns):
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
            try:
                flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_TUN_EXCL
                fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", chosen.encode(), flags))
                return chosen, fd
            except OSError as error:
                os.close(fd)
                if error.errno != errno.EBUSY or name is not None or attempt == ATTEMPTS:
                    why = "there is an interface of that name" if error.errno == errno.EBUSY else error.strerror
                    raise HostError(f"the TAP {chosen!r} cannot be made: {why}") from error
    raise AssertionError("unreachable")


def open_tap(name: str, netns: str | None, *, ours: bool) -> int:
    """Return a file descriptor attached to a TAP, made if it is not there.

    A TAP that is ours is no longer persistent from then on: the kernel removes it with the last process that holds the
    descriptor, however that ends. Raises HostError where it is busy or cannot be opened.
    """
    import fcntl

    with inside(netns):
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
            if ours:
                fcntl.ioctl(fd, TUNSETPERSIST, 0)
        except OSError as error:
            os.close(fd)
            raise HostError(f"the TAP {name!r} cannot be attached to: {error.strerror}; another VM may use it") from error
    return fd


@dataclass(frozen=True, slots=True)
class Nic:
    """One NIC of a VM: what the driver attaches it to, and the address the guest is told (None: not ours to say)."""

    attachment: Tap | UserNetwork | Network
    address: NicAddress | None


def lease_tap_nic(lease: Lease, wanted: Tap, pool: IPv4Net, netns: str | None) -> tuple[Nic, Subnet | None]:
    """Return a NIC on a TAP, point to point with the host; an existing TAP that is named is used as it is."""
    if wanted.name is not None and interface_exists(wanted.name, netns):
        return Nic(wanted, None), None
    subnet = take_subnet(pool, POINT_TO_POINT_PREFIX, lease, netns)
    try:
        address = ipaddress.IPv4Interface((subnet.host, POINT_TO_POINT_PREFIX))
        name = make_tap(lease, wanted.name, address, netns)
    except BaseException:
        subnet.release()
        raise
    guest = NicAddress(ipaddress.IPv4Interface((subnet.guest, POINT_TO_POINT_PREFIX)), subnet.host)
    return Nic(Tap(name, wanted.mac, take_over=True), guest), subnet


def lease_user_nic(lease: Lease, pool: IPv4Net, *, outbound: bool) -> tuple[Nic, Subnet]:
    """Return a NIC on QEMU's user-mode network, with a subnet that no other VM of the machine has."""
    subnet = take_subnet(pool, POINT_TO_POINT_PREFIX, lease, of_the_host=False)
    guest = NicAddress(ipaddress.IPv4Interface((subnet.guest, POINT_TO_POINT_PREFIX)), subnet.host)
    return Nic(UserNetwork(subnet.network, subnet.host, subnet.guest, outbound=outbound), guest), subnet


def lease_network_nic(lease: Lease, network: Network) -> Nic:
    """Return a NIC on a network of several VMs, with the next address that none of them has had."""
    hosts = lease.host.next_addresses.setdefault(network, iter(list(network.subnet.hosts())[1:]))
    address = next(hosts, None)
    if address is None:
        raise InvalidConfigError(f"network {network.name!r} has no address left in {network.subnet}")
    guest = NicAddress(ipaddress.IPv4Interface((address, network.subnet.prefixlen)), network.subnet[1] if network.bridge else None)
    if network.bridge is None:
        return Nic(network, guest)
    return Nic(Tap(make_tap(lease, None, None, None, bridge=network.bridge), None, take_over=True), guest)


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


def remove_taps(names: tuple[str, ...], netns: str | None) -> list[str]:
    """Remove TAPs; returns what could not be removed, in words."""
    return [failure for name in names for failure in remains.remove_tap(name, netns)]

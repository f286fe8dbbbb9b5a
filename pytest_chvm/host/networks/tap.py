"""TAPs of the host: made for one VM, or somebody else's."""

from __future__ import annotations

import errno
import ipaddress
import itertools
import os
import struct

from pytest_chvm.base.untouched import random_hex
from pytest_chvm.errors import HostError, MissingRequirementError
from pytest_chvm.host.capabilities import missing
from pytest_chvm.host.keeper import remains
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.namespaces import inside
from pytest_chvm.host.netlink import route_socket
from pytest_chvm.host.networks.nic import Need, Nic
from pytest_chvm.host.networks.subnets import POINT_TO_POINT_PREFIX, take_subnet
from pytest_chvm.model import NicAddress, Tap

# linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNSETPERSIST = 0x400454CB
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_TUN_EXCL = 0x0002, 0x1000, 0x4000, 0x8000
ATTEMPTS = 5


def why_no_taps() -> str | None:
    """Return why this process cannot make TAPs, or None where it can."""
    if not os.path.exists("/dev/net/tun"):
        return "/dev/net/tun is not there"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun may not be opened"
    if missing(["CAP_NET_ADMIN"]):
        return "there is no CAP_NET_ADMIN"
    return _why_no_tap_here()


def _why_no_tap_here() -> str | None:
    """Return why the kernel refuses this process a TAP in its network namespace, or None where it does not.

    It is asked for an interface of no type: whether a new one may be made is what it looks at first (tun_set_iff in
    drivers/net/tun.c). One that was really made would take 20 ms to be gone, of each run's first VM.
    """
    import fcntl

    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"/dev/net/tun cannot be opened: {error.strerror}"
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"", IFF_NO_PI))
    except OSError as error:
        if error.errno != errno.EINVAL:
            # Root of a user namespace has all capabilities, but none over a network that is not of that namespace.
            return f"{error.strerror} (as root of a user namespace or container whose network is not its own?)"
    finally:
        os.close(fd)
    return None


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


def lease_tap_nic(wanted: Tap, need: Need) -> Nic:
    """Return a NIC on a TAP, point to point with the host; an existing TAP that is named is used as it is."""
    if wanted.name is not None and interface_exists(wanted.name, need.netns):
        return Nic(wanted)
    subnet = take_subnet(need.pool, POINT_TO_POINT_PREFIX, need.lease, need.netns)
    try:
        address = ipaddress.IPv4Interface((subnet.host, POINT_TO_POINT_PREFIX))
        name = make_tap(need.lease, wanted.name, address, need.netns)
    except BaseException:
        subnet.release()
        raise
    guest = NicAddress(ipaddress.IPv4Interface((subnet.guest, POINT_TO_POINT_PREFIX)), subnet.host)
    return Nic(Tap(name, wanted.mac, take_over=True), guest, subnet)


def remove_taps(names: tuple[str, ...], netns: str | None) -> list[str]:
    """Remove TAPs; returns what could not be removed, in words."""
    return [failure for name in names for failure in remains.remove_tap(name, netns)]

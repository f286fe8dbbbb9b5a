"""What a guest's NIC is attached to."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.model.values import checked_mac

# IFNAMSIZ is 16 with the final NUL; the kernel refuses "/", ":" and white space, and ip(8) takes a leading "-" for an option.
INTERFACE_PATTERN = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,14}")


@dataclass(frozen=True, slots=True)
class Tap:
    """A TAP interface of the host as the other end of a guest's NIC.

    `name=None`: one is made with a name of its own. One that does not exist is made and removed by us;
    one that does is somebody else's and is left, unless `take_over`. `mac=None`: derived from the VM's name.
    """

    name: str | None = None
    mac: str | None = None
    take_over: bool = False

    def __post_init__(self) -> None:
        if self.name is not None and (
            not isinstance(self.name, str) or not INTERFACE_PATTERN.fullmatch(self.name) or self.name in (".", "..")
        ):
            raise InvalidConfigError(
                f"TAP name {self.name!r} cannot be an interface name: expected 1 to 15 letters, digits, "
                "'-', '_' or '.', not beginning with '-'"
            )
        if self.mac is not None:
            object.__setattr__(self, "mac", checked_mac(self.mac))


@dataclass(frozen=True, slots=True)
class SocketPairFd:
    """One end of a socket pair as the other end of a guest's NIC (not on Linux: use a TAP)."""

    fd: int


@dataclass(frozen=True, slots=True)
class Network:
    """An isolated L2 network for several VMs of one test; made by the fixture `chvm_network`.

    `subnet` is where its VMs' addresses are from; the host has the first one where `bridge` names a
    bridge of the host, and has none where it is None (`multicast`, a group and port on loopback
    over which QEMU carries the frames, is set instead).
    """

    name: str
    subnet: ipaddress.IPv4Network
    bridge: str | None = None
    multicast: str | None = None


@dataclass(frozen=True, slots=True)
class UserNetwork:
    """QEMU's user-mode network: `subnet` exists inside the VMM only.

    At `host` the guest reaches what listens on the host's loopback, and beyond it what the host reaches; nothing of that without
    `outbound`.
    """

    subnet: ipaddress.IPv4Network
    host: ipaddress.IPv4Address
    guest: ipaddress.IPv4Address
    mac: str | None = None
    outbound: bool = True


Attachment = Tap | SocketPairFd | Network | UserNetwork


@dataclass(frozen=True, slots=True)
class NicAddress:
    """What the guest's NIC is told on its kernel command line: `address` has the prefix length."""

    address: ipaddress.IPv4Interface
    gateway: ipaddress.IPv4Address | None = None

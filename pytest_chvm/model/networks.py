"""What a guest's NIC is attached to, a class a kind.

Each says `ability`, the one of a driver's `Abilities` without which it cannot have a NIC there; `reaches_host`, whether by it the
guest reaches the host; `forwarded`, whether the guest's ports are reached by a forwarding of the VMM's; `clonable`, whether a clone
of a template can be on it.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import ClassVar

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

    ability: ClassVar[str | None] = None
    reaches_host: ClassVar[bool] = True
    forwarded: ClassVar[bool] = False
    clonable: ClassVar[bool] = True

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
    """One end of a socket pair as the other end of a guest's NIC: of macOS only, so that `VmConfig` refuses it (use a `Tap`)."""

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

    mac: ClassVar[str | None] = None
    forwarded: ClassVar[bool] = False

    @property
    def ability(self) -> str | None:
        """Without a bridge the VMM carries the frames."""
        return None if self.bridge else "multicast_network"

    @property
    def reaches_host(self) -> bool:
        """On a bridge the host is the guest's neighbour."""
        return self.bridge is not None

    @property
    def clonable(self) -> bool:
        """On a bridge a NIC is a TAP's."""
        return self.bridge is not None


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

    ability: ClassVar[str | None] = "user_network"
    forwarded: ClassVar[bool] = True
    clonable: ClassVar[bool] = False

    @property
    def reaches_host(self) -> bool:
        """Whether the guest reaches the host, and what the host reaches."""
        return self.outbound


Attachment = Tap | Network | UserNetwork


@dataclass(frozen=True, slots=True)
class NicAddress:
    """What the guest's NIC is told on its kernel command line: `address` has the prefix length."""

    address: ipaddress.IPv4Interface
    gateway: ipaddress.IPv4Address | None = None

"""QEMU's arguments for a VM's NICs and shared dirs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_chvm.drivers.boot import Boot
from pytest_chvm.drivers.taps import taps_of
from pytest_chvm.host.networks.tap import open_tap
from pytest_chvm.model import Network, UserNetwork, mac_for


def shares(boot: Boot) -> list[str]:
    """Return the arguments of the shared dirs, whose virtiofsd listen already."""
    words = []
    for index, (share, path) in enumerate(zip(boot.config.shared_dirs, boot.share_sockets, strict=True)):
        words += ["-chardev", f"socket,id=fs{index},path={quoted(path)}"]
        words += ["-device", f"vhost-user-fs-pci,chardev=fs{index},tag={share.tag},queue-size=512"]
    return words


def nics(boot: Boot, shown: dict[str, str]) -> list[str]:
    """Return the arguments of the NICs; `shown` gets what stands for their descriptors in a text for people."""
    config = boot.config
    words = []
    taps = {tap.index: tap for tap in taps_of(boot)}
    for index, network in enumerate(config.networks or ()):
        if tap := taps.get(index):
            number = boot.add_fd(open_tap(tap.name, config.netns, ours=tap.ours))
            words += ["-netdev", f"tap,id=net{index},fd={number}"]
            shown[f"fd={number}"] = f"ifname={tap.name},script=no,downscript=no"
        else:
            words += ["-netdev", NETDEVS[type(network)](network, f"net{index}")]
        mac = network.mac or mac_for(config.name, index)
        words += ["-device", f"virtio-net-pci,netdev=net{index},mac={mac},romfile="]
    return words


def _user_netdev(network: UserNetwork, name: str) -> str:
    addresses = f"net={network.subnet},host={network.host},dns={network.subnet[3]},dhcpstart={network.guest}"
    return f"user,id={name},{addresses}{'' if network.outbound else ',restrict=on'}"


def _multicast_netdev(network: Network, name: str) -> str:
    return f"socket,id={name},mcast={network.multicast},localaddr=127.0.0.1"


# The kinds of network that need no TAP.
NETDEVS: dict[type, Callable[[Any, str], str]] = {UserNetwork: _user_netdev, Network: _multicast_netdev}


def quoted(path: Path) -> str:
    """Return a path as an option's value: QEMU's option parser takes a doubled comma as one."""
    return os.fspath(path).replace(",", ",,")

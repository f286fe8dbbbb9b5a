"""The kinds of network."""

from __future__ import annotations

import ipaddress

import pytest

from pytest_chvm.drivers.base import Abilities
from pytest_chvm.model import Network, Tap, UserNetwork

SUBNET = ipaddress.IPv4Network("198.18.0.0/30")
USER = UserNetwork(SUBNET, SUBNET[1], SUBNET[2])


@pytest.mark.parametrize(
    ("network", "ability", "reaches_host", "forwarded", "clonable"),
    [
        (Tap(), None, True, False, True),
        (USER, "user_network", True, True, False),
        (UserNetwork(SUBNET, SUBNET[1], SUBNET[2], outbound=False), "user_network", False, True, False),
        (Network("bridged", SUBNET, bridge="br0"), None, True, False, True),
        (Network("multicast", SUBNET, multicast="239.1.2.3:4700"), "multicast_network", False, False, False),
    ],
    ids=["tap", "user", "user-without-outbound", "bridge", "multicast"],
)
def test_what_each_kind_is(network, ability, reaches_host, forwarded, clonable):
    assert (network.ability, network.reaches_host, network.forwarded, network.clonable) == (
        ability, reaches_host, forwarded, clonable,
    )  # fmt: skip
    assert ability is None or hasattr(Abilities(), ability)

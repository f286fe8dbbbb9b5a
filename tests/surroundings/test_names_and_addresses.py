"""Names and addresses that others have chosen too: of networks, TAPs and clones."""

from __future__ import annotations

import pytest

from pytest_chvm import MissingRequirementError
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.networks import NETWORK_PREFIX, Subnet, lease_network, lease_network_nic, parse_pool, take_subnet


def test_networks_of_one_name_have_addresses_of_their_own(pool: str) -> None:
    first, second = (lease_network(parse_pool(pool), "lan") for _ in range(2))
    lease = Lease()
    try:
        for leased in (first, second):
            address = lease_network_nic(lease, leased.network).address
            assert address is not None
            assert address.address.ip == leased.network.subnet[2]
        assert first.close() == []
        after = lease_network_nic(lease, second.network).address
        assert after is not None
        assert after.address.ip == second.network.subnet[3]
    finally:
        assert [*lease.release(), *first.close(), *second.close()] == []


def test_a_pool_without_a_free_subnet_is_a_missing_requirement(pool: str) -> None:
    lease = Lease()
    taken: list[Subnet] = []
    try:
        # Of a /22 networks have the upper half.
        taken += [take_subnet(parse_pool(pool), NETWORK_PREFIX, lease) for _ in range(2)]
        with pytest.raises(MissingRequirementError, match=f"no /{NETWORK_PREFIX} subnet is free"):
            take_subnet(parse_pool(pool), NETWORK_PREFIX, lease)
    finally:
        for subnet in taken:
            subnet.release()
        assert lease.release() == []

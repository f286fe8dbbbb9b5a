"""Names and addresses that others have chosen too: of networks, TAPs and clones."""

from __future__ import annotations

import pytest

from pytest_chvm import InvalidConfigError, MissingRequirementError
from pytest_chvm.host.host import default_host
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.networks.isolated import lease_network, lease_network_nic
from pytest_chvm.host.networks.nic import Need
from pytest_chvm.host.networks.subnets import NETWORK_PREFIX, Subnet, parse_pool, take_subnet
from pytest_chvm.machine.vm import Snapshot
from pytest_chvm.plugin.factory import VmFactory
from tests.conftest import kept


def test_networks_of_one_name_have_addresses_of_their_own(pool: str) -> None:
    first, second = (lease_network(default_host(), parse_pool(pool), "lan") for _ in range(2))
    lease = Lease(default_host())
    need = Need(lease, parse_pool(pool))
    try:
        for leased in (first, second):
            address = lease_network_nic(leased.network, need).address
            assert address is not None
            assert address.address.ip == leased.network.subnet[2]
        assert first.close() == []
        after = lease_network_nic(second.network, need).address
        assert after is not None
        assert after.address.ip == second.network.subnet[3]
    finally:
        assert [*lease.release(), *first.close(), *second.close()] == []


def test_a_pool_without_a_free_subnet_is_a_missing_requirement(pool: str) -> None:
    lease = Lease(default_host())
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


@pytest.mark.parametrize("name", ["a/b", "", "-a", "../a", "n" * 64])
def test_a_clone_s_name_that_is_none_is_refused(saved: Snapshot, name: str) -> None:
    with pytest.raises(InvalidConfigError, match="cannot be a VM's name"):
        saved.clone(name=name)


def test_a_clone_s_name_that_is_running_is_refused_at_once(saved: Snapshot) -> None:
    with saved.clone(name="running") as vm:
        # It would have to wait for all that it takes from the machine.
        before = kept()
        with pytest.raises(InvalidConfigError, match=r"'running' .* is running already"):
            saved.clone(name="running")
        assert kept() == before
        assert vm.check_output("echo here") == "here\n"
    saved.clone(name="running").close()


@pytest.fixture(scope="module")
def saved(chvm_vm_factory: VmFactory) -> Snapshot:
    """A saved VM of the built-in guest."""
    return chvm_vm_factory(networks=[]).snapshot()

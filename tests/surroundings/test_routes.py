"""VMs on hosts whose routes leave no room, or seem to: VPNs, Docker, no IPv6. Each has a network namespace of its own for a host."""

from __future__ import annotations

import ipaddress
import subprocess
import sys

import pytest

from pytest_chvm import MissingRequirementError
from pytest_chvm.host.host import default_host
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.networks.subnets import DEFAULT_POOL, FURTHER_POOLS, parse_pool, take_subnet

DEFAULT_OF_A_VPN = ("0.0.0.0/1", "128.0.0.0/1")
# WireGuard's, of all addresses but the private ones and one server's.
INTERNET_OF_A_VPN = ("192.0.0.0/9", "196.0.0.0/6", "198.16.0.0/12", "11.0.0.0/8")
DOCKER = tuple(f"172.{number}.0.0/16" for number in range(17, 30))
# What a VM is to get, and that host and guest reach each other.
VM = """
import subprocess, sys
from pytest_chvm import launch
with launch(vmm="qemu", network=sys.argv[1]) as vm, launch(vmm="qemu", network=sys.argv[1]) as other:
    assert vm.ip != other.ip
    if sys.argv[1] == "tap":
        vm.check_output(f"ping -c 1 -W 5 {vm.config.networks and vm.check_output('ip route').split()[2]}")
    assert vm.address(80)[1]
    print(vm.ip)
"""


@pytest.fixture
def host(netns):
    """Commands in a namespace that stands for a host, with a link that leads to a network and loopback."""

    def run(*command, **options):
        return subprocess.run(["ip", "netns", "exec", netns, *command], check=True, text=True, **options)

    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "uplink", "type", "bridge")
    run("ip", "addr", "add", "192.0.2.2/24", "dev", "uplink")
    run("ip", "link", "set", "uplink", "up")
    return run


@pytest.fixture
def lease():
    lease = Lease(default_host())
    yield lease
    assert lease.release() == []


def routes(host, *networks):
    for network in networks:
        host("ip", "route", "add", network, "dev", "uplink")


@pytest.mark.parametrize("network", ["tap", "user"])
@pytest.mark.parametrize(
    ("routed", "claimed"),
    [
        ((*DEFAULT_OF_A_VPN, *DOCKER), ()),
        (INTERNET_OF_A_VPN, ()),
        ((*DEFAULT_OF_A_VPN, "198.18.0.0/16"), ("198.18.0.0/16",)),
    ],
    ids=["default of a VPN, and Docker", "Internet of a VPN", "names of a VPN"],
)
def test_vms_start_whatever_is_routed(host, network, routed, claimed):
    routes(host, *routed)
    said = host(sys.executable, "-c", VM, network, stdout=subprocess.PIPE, timeout=60).stdout
    address = ipaddress.ip_address(said.strip())
    if network == "tap":
        assert not any(address in ipaddress.ip_network(each) for each in claimed)


def test_vms_start_where_there_is_no_ipv6(host):
    host("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    host(sys.executable, "-c", VM, "tap", timeout=60)


@pytest.mark.parametrize("prefix", [30, 24])
def test_other_pools_are_tried_in_turn_where_the_default_one_is_routed(host, netns, lease, prefix):
    found = []
    for each in (parse_pool(DEFAULT_POOL), *FURTHER_POOLS):
        subnet = take_subnet(parse_pool(DEFAULT_POOL), prefix, lease, netns)
        subnet.release()
        assert subnet.network.subnet_of(each)
        found.append(subnet.network)
        routes(host, *map(str, each.subnets()))
    with pytest.raises(MissingRequirementError, match="each is routed or in use; name another"):
        take_subnet(parse_pool(DEFAULT_POOL), prefix, lease, netns)


def test_a_site_of_private_addresses_is_left_alone(host, netns, lease):
    routes(host, "198.18.0.0/15", "10.0.0.0/8", *DEFAULT_OF_A_VPN)
    subnet = take_subnet(parse_pool(DEFAULT_POOL), 30, lease, netns)
    subnet.release()
    assert subnet.network.subnet_of(FURTHER_POOLS[1])
    with pytest.raises(MissingRequirementError, match=r"10\.50\.0\.0/16"):
        take_subnet(parse_pool("10.50.0.0/16"), 30, lease, netns)

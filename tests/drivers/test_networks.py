"""TAPs and subnets: made, lent to one VM at a time, and removed by those that made them only."""

import ipaddress
import os
import signal
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_chvm import HostError, HypervisorError, InvalidConfigError, Settings, Tap, UnsupportedError, launch
from pytest_chvm.host.directories import common_lock_dir
from pytest_chvm.host.host import default_host
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.networks.nic import Need
from pytest_chvm.host.networks.subnets import parse_pool, take_subnet
from pytest_chvm.host.networks.tap import lease_tap_nic, make_tap


@pytest.fixture
def lease():
    lease = Lease(default_host())
    yield lease
    lease.release()


@pytest.fixture
def existing_tap(tap_name):
    subprocess.run(["ip", "tuntap", "add", "dev", tap_name, "mode", "tap"], check=True)
    return tap_name


def test_taps_are_named_within_what_the_kernel_takes(vmm, needs_taps, link_exists):
    handle = vmm.boot(networks=[Tap(), Tap()])
    assert len(handle.taps) == 2
    for name in handle.taps:
        assert len(name.encode()) <= 15
        assert link_exists(name)
    vmm.driver.stop(handle)
    assert not any(map(link_exists, handle.taps))


def test_tap_that_was_there_is_somebody_elses(vmm, existing_tap, link_exists):
    handle = vmm.boot(networks=[Tap(existing_tap)])
    vmm.driver.stop(handle)
    assert link_exists(existing_tap)


def test_tap_that_was_there_is_removed_where_it_was_handed_over(vmm, existing_tap, link_exists):
    handle = vmm.boot(networks=[Tap(existing_tap, take_over=True)])
    vmm.driver.kill(handle)
    assert not link_exists(existing_tap)


def test_failed_boot_leaves_a_tap_that_was_there(ch, stand_in_ch, existing_tap, link_exists, tmp_path):
    broken = tmp_path / "broken"
    broken.write_bytes(b"QFI\xfb" + b"\xff" * 1000)
    with pytest.raises(HostError, match="no overlay"):
        ch.boot(networks=[Tap(existing_tap)], root_disk=broken)
    assert link_exists(existing_tap)


def test_kernel_removes_qemus_tap_with_it(qemu, tap_name, link_exists, wait_ended):
    """QEMU takes it as a descriptor, so that nothing has to survive to remove it."""
    handle = qemu.boot(networks=[Tap(tap_name)])
    assert link_exists(tap_name)
    os.kill(handle.process.pid, signal.SIGKILL)
    assert wait_ended(handle.process.pid)
    assert not link_exists(tap_name)


def test_tap_is_in_the_lease_before_it_is_made(lease, tap_name, monkeypatch):
    from pytest_chvm.host.networks import tap

    def refuse(netns):
        raise OSError("interrupted")

    monkeypatch.setattr(tap, "route_socket", refuse)
    with pytest.raises(HostError, match="cannot be made: interrupted"):
        make_tap(lease, tap_name, None, None)
    assert tap_name in (lease.directory / "lease.json").read_text()


def test_tap_in_a_namespace(vmm, netns, link_exists):
    handle = vmm.boot(netns=netns, networks=[Tap()])
    (name,) = handle.taps
    assert not link_exists(name)

    def in_namespace():
        return subprocess.run(["ip", "-n", netns, "link", "show", "dev", name], capture_output=True, check=False).returncode == 0

    assert in_namespace()
    vmm.driver.stop(handle)
    assert not in_namespace()


def test_point_to_point_subnet_of_a_tap(lease, needs_taps, pool):
    nic = lease_tap_nic(Tap(), Need(lease, parse_pool(pool)))
    subnet = nic.subnet
    try:
        assert subnet.network.prefixlen == 30
        assert subnet.network.subnet_of(parse_pool(pool))
        assert (nic.address.gateway, nic.address.address.ip) == (subnet.network[1], subnet.network[2])
        shown = subprocess.check_output(["ip", "-o", "addr", "show", "dev", nic.attachment.name], text=True)
        assert f"inet {subnet.network[1]}/30" in shown
    finally:
        subnet.release()


TAKER = """
import sys
from pytest_chvm.host.host import default_host
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.networks.subnets import parse_pool, take_subnet
lease, held = Lease(default_host()), []
sys.stdin.readline()
for _number in range(int(sys.argv[2])):
    held.append(take_subnet(parse_pool(sys.argv[1]), 30, lease))
print(*(subnet.network for subnet in held), flush=True)
sys.stdin.readline()
for subnet in held:
    subnet.release()
lease.release()
"""


def test_processes_that_take_subnets_at_once_never_collide(lease, pool):
    """The pool's lower half has 128 of them: four processes take all, at the same time."""
    processes = [
        subprocess.Popen([sys.executable, "-c", TAKER, pool, "32"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _number in range(4)
    ]
    try:
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        taken = [network for process in processes for network in process.stdout.readline().split()]
        assert len(taken) == len(set(taken)) == 128
        with pytest.raises(InvalidConfigError, match=r"no /30 subnet is free in the pool .*CHVM_SUBNET_POOL"):
            take_subnet(parse_pool(pool), 30, lease)
        # What a process held is free when it is gone, however it went.
        gone = processes.pop()
        gone.kill()
        gone.communicate()
        take_subnet(parse_pool(pool), 30, lease).release()
    finally:
        for process in processes:
            process.communicate("done\n", timeout=120)
    left = [path for path in common_lock_dir().glob("subnet-*") if any(network.split("/")[0] in path.name for network in taken)]
    # Those of the killed one are for its keeper to remove.
    assert len(left) <= 32


def test_subnets_that_are_routed_on_the_host_are_skipped(lease, pool, existing_tap):
    network = parse_pool(pool)
    routed = list(network.subnets(new_prefix=25))[0]
    subprocess.run(["ip", "addr", "add", f"{routed[1]}/25", "dev", existing_tap], check=True)
    subprocess.run(["ip", "link", "set", existing_tap, "up"], check=True)
    held = []
    try:
        for _number in range(96):
            held.append(take_subnet(network, 30, lease))
        assert not [subnet.network for subnet in held if subnet.network.overlaps(routed)]
        with pytest.raises(InvalidConfigError, match="is free"):
            take_subnet(network, 30, lease)
    finally:
        for subnet in held:
            subnet.release()


def test_networks_and_single_vms_never_share_addresses(lease, pool):
    network = parse_pool(pool)
    single, several = take_subnet(network, 30, lease), take_subnet(network, 24, lease)
    try:
        assert not single.network.overlaps(several.network)
    finally:
        single.release()
        several.release()


def test_released_subnet_leaves_no_lock_file(lease, pool):
    subnet = take_subnet(parse_pool(pool), 30, lease)
    path = common_lock_dir() / f"subnet-{subnet.network.network_address}-30.lock"
    # Any user may try it.
    assert path.stat().st_mode & 0o777 == 0o666
    subnet.release()
    assert not path.exists()


def test_lock_directory_is_for_all_users(lease, pool):
    # As long as it is held, nobody who leaves removes the directory.
    subnet = take_subnet(parse_pool(pool), 30, lease)
    assert common_lock_dir().stat().st_mode & 0o7777 == 0o1777
    subnet.release()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10.0.0.0/24", "too small: expected /22 or larger"),
        ("10.0.0.1/16", "has host bits set"),
        ("everything", "expected a network like 198.18.0.0/15"),
        ("fd00::/8", "expected a network like 198.18.0.0/15"),
    ],
)
def test_pool_that_cannot_be(text, message):
    with pytest.raises(InvalidConfigError, match=message):
        parse_pool(text)


def serve(vm):
    vm.check_output("mkdir -p /tmp/www; echo hello from $(hostname) >/tmp/www/index.html; httpd -p 80 -h /tmp/www")


def launched(tmp_path, **arguments):
    return launch(vmm="qemu", name=f"net-{uuid.uuid4().hex[:6]}", serial_log=tmp_path / "serial.log", **arguments)


def test_guest_on_a_tap_is_reachable_at_its_ip(needs_taps, tmp_path, http_get, pool):
    with launched(tmp_path, network="tap", settings=replace(Settings.resolve(), subnet_pool=pool)) as vm:
        assert ipaddress.ip_address(vm.ip) in ipaddress.ip_network(pool)
        serve(vm)
        assert vm.address(80) == (vm.ip, 80)
        assert f"hello from {vm.name}".encode() in http_get(vm.address(80))
        (name,) = vm.handle.taps
    assert not Path("/sys/class/net", name).exists()
    assert not list(common_lock_dir().glob(f"subnet-{ipaddress.ip_address(vm.ip) - 2}-*"))


def test_guest_in_a_namespace_is_reachable_through_a_relay(netns, tmp_path, http_get):
    with launched(tmp_path, network="tap", netns=netns) as vm:
        serve(vm)
        for _time in range(2):
            assert f"hello from {vm.name}".encode() in http_get(vm.address(80))
        assert vm.address(80) == vm.address(80)
        assert vm.address(80)[0] == "127.0.0.1"
        address = vm.address(80)
    with pytest.raises(ConnectionRefusedError):
        http_get(address)


def test_guest_on_the_user_mode_network_is_reachable_through_forwarded_ports(tmp_path, http_get):
    with launched(tmp_path, network="user") as vm:
        assert vm.ip != "127.0.0.1"
        serve(vm)
        host, port = vm.address(80)
        assert host == "127.0.0.1"
        assert vm.address(80) == (host, port)
        assert vm.address(81) != (host, port)
        assert f"hello from {vm.name}".encode() in http_get((host, port))
        assert vm.handle.taps == ()
        with pytest.raises(InvalidConfigError, match="port=0: expected 1 to 65535"):
            vm.address(0)


def test_user_mode_is_qemus_alone(ch, stand_in_ch, fake_kernel):
    with pytest.raises(UnsupportedError, match=r"no user-mode network: use tap or none, or --chvm-vmm=qemu"):
        launch(vmm="cloud-hypervisor", network="user", kernel=fake_kernel, initramfs=fake_kernel)
    assert stand_in_ch.records() == []


def test_user_mode_does_not_go_with_a_namespace(netns):
    with pytest.raises(InvalidConfigError, match="netns goes with a TAP"):
        launch(vmm="qemu", network="user", netns=netns)


def test_errors_name_the_vm_and_the_vmm(ch, stand_in_ch):
    with pytest.raises(UnsupportedError, match="cloud-hypervisor cannot give a guest virtio-serial ports") as caught:
        ch.boot(name="lonely", channels=["one"])
    assert caught.value.vm_name == "lonely"
    assert not isinstance(caught.value, HypervisorError)

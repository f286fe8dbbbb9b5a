"""Disks, shared dirs, networks and hotplug, with both VMMs."""

import os
import signal
import subprocess
import threading
import uuid

import pytest

from pytest_chvm import (
    BootFailedError,
    HypervisorError,
    InvalidConfigError,
    Settings,
    SharedDir,
    Tap,
    UnsupportedError,
    VmConfig,
    VmIOError,
)
from pytest_chvm.base.deadline import Deadline
from pytest_chvm.machine.guest_choice import choose_guest
from pytest_chvm.model import mac_for
from tests.conftest import AT_ONCE_S

WAIT_FOR = "n=0; until {}; do n=$((n+1)); [ $n -lt 100 ] || exit 1; usleep 100000; done"


@pytest.fixture
def disk(tmp_path):
    """A raw image of 8 MiB with a mark at its start."""
    image = tmp_path / "disk.img"
    image.write_bytes(b"mark" + bytes((8 << 20) - 4))
    return image


@pytest.fixture
def two_taps(needs_taps):
    """The names of two TAPs that are there, and not ours."""
    names = [f"ct{uuid.uuid4().hex[:8]}" for _ in range(2)]
    for name in names:
        subprocess.run(["ip", "tuntap", "add", "dev", name, "mode", "tap"], check=True)
    yield names
    for name in names:
        subprocess.run(["ip", "link", "del", name], check=True)


def test_all_that_a_config_names_is_what_the_guest_has(boot, disk, tmp_path, tap_name, link_exists):
    subprocess.run(["ip", "tuntap", "add", "dev", tap_name, "mode", "tap"], check=True)
    data, seed, log = tmp_path / "data.img", tmp_path / "seed.iso", tmp_path / "serial.log"
    data.write_bytes(bytes(4 << 20))
    seed.write_bytes(b"seed" + bytes((1 << 20) - 4))
    # With a root disk there is no initramfs by itself; an old marker is no marker.
    initramfs = choose_guest(VmConfig(), Settings.resolve()).config.initramfs
    log.write_text("CHVM_READY 192.0.2.99\n")
    cpus = min(2, os.cpu_count())
    vm = boot(
        cpus=cpus, memory_mb=300, root_disk=disk, seed_iso=seed, data_disk=data, initramfs=initramfs, serial_log=log,
        networks=[Tap(), Tap(tap_name), Tap(mac="52:54:00:AA:bb:cc")],
    )  # fmt: skip
    assert vm.ip == "127.0.0.1"
    assert vm.check_output("nproc") == f"{cpus}\n"
    assert 250 < int(vm.check_output("sed -n 's/MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo")) >> 10 <= 300
    assert "console=ttyS0 root=/dev/vda1 rw ds=nocloud" in vm.check_output("cat /proc/cmdline")
    macs = vm.check_output("cat /sys/class/net/eth0/address /sys/class/net/eth1/address /sys/class/net/eth2/address").split()
    assert macs == [mac_for(vm.name, 0), mac_for(vm.name, 1), "52:54:00:aa:bb:cc"]
    assert vm.check_output("head -c 4 /dev/vda; head -c 4 /dev/vdb") == "markseed"
    vm.check_output("printf over | dd of=/dev/vda conv=notrunc; printf kept | dd of=/dev/vdc conv=notrunc; sync")
    assert vm.run("printf x >/dev/vdb; sync").returncode != 0 or seed.read_bytes()[:4] == b"seed"
    taps = vm.handle.taps
    vm.shutdown()
    assert disk.read_bytes()[:4] == b"mark"
    assert data.read_bytes()[:4] == b"kept"
    assert seed.read_bytes()[:4] == b"seed"
    assert log.exists()
    # What was somebody else's is left, what was made for the VM is not.
    assert link_exists(tap_name)
    assert len(taps) == 2
    assert not any(map(link_exists, taps))


def test_a_disk_that_another_vm_has_is_refused(boot, disk):
    boot(data_disk=disk, network="none")
    with pytest.raises(BootFailedError, match=r"(?i)lock"):
        boot(data_disk=disk, network="none", name="second")


def test_an_image_whose_backing_file_is_gone_is_refused(boot, disk, tmp_path):
    overlay = tmp_path / "overlay.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", disk, overlay], check=True)
    disk.unlink()
    with pytest.raises(InvalidConfigError, match=r"stands on '[^']*disk\.img', which does not exist"):
        boot(data_disk=overlay, network="none")


def test_shares_carry_both_ways_and_a_read_only_one_is_read_only(boot, tmp_path):
    open_dir, closed_dir = tmp_path / "open dir, with a comma", tmp_path / "closed"
    for place in (open_dir, closed_dir):
        place.mkdir()
        (place / "from-host").write_text("hello")
    vm = boot(shared_dirs=[SharedDir("open", open_dir), SharedDir("closed", closed_dir, read_only=True)])
    assert vm.check_output("cat /mnt/open/from-host /mnt/closed/from-host") == "hellohello"
    vm.check_output("echo hi >/mnt/open/from-guest")
    assert (open_dir / "from-guest").read_text() == "hi\n"
    # Root of the guest may mount it anew as it likes: the host's side says no.
    vm.run("mount -o remount,rw /mnt/closed")
    assert vm.run("echo no >/mnt/closed/from-guest").returncode != 0
    assert not (closed_dir / "from-guest").exists()


def test_a_virtiofsd_that_dies_is_an_error_at_once_that_names_the_share(boot, tmp_path):
    vm = boot(shared_dirs={"code": tmp_path}, network="none")
    os.kill(vm.handle.sidecars[0].pid, signal.SIGKILL)
    with pytest.raises(HypervisorError, match=r"virtiofsd .* for shared dir 'code' .* signal 9"):
        vm.run("sleep 60", timeout=40)


def test_two_vms_of_a_network_reach_each_other(boot, chvm_network):
    network = chvm_network()
    one = boot(networks=[network], name="one", wait=False)
    two = boot(networks=[network], name="two", wait=False)
    one.wait_ready()
    two.wait_ready()
    assert one.ip != two.ip
    assert " 0% packet loss" in one.check_output(["ping", "-c", "2", "-W", "5", two.ip])


def test_a_named_network_namespace_has_the_vm_and_the_host_does_not(boot):
    name = "chvm-behaviour"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        vm = boot(netns=name)
        vm.check_output("httpd -p 8080 -h /etc")
        import urllib.request

        host, port = vm.address(8080)
        with urllib.request.urlopen(f"http://{host}:{port}/passwd", timeout=10) as answer:
            assert answer.read().startswith(b"root:")
        vm.stop()
        links = subprocess.run(["ip", "-n", name, "-br", "link"], check=True, capture_output=True, text=True).stdout
        assert "chvm" not in links
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_devices_come_and_go_while_the_vm_runs(boot, disk, tmp_path):
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "file").write_text("late")
    vm = boot(hotplug=True, max_cpus=2, max_memory_mb=512)
    plugged = vm.add_disk(disk)
    assert vm.check_output(WAIT_FOR.format("[ -b /dev/vda ]") + "; head -c 4 /dev/vda") == "mark"
    nic = vm.add_network()
    vm.check_output(WAIT_FOR.format("[ -d /sys/class/net/eth1 ]"))
    share = vm.add_shared_dir("late", tmp_path / "late")
    mounted = "mount -t virtiofs late /mnt/late 2>/dev/null"
    assert vm.check_output("mkdir -p /mnt/late; " + WAIT_FOR.format(mounted) + "; cat /mnt/late/file; umount /mnt/late") == "late"
    for device in (plugged, nic, share):
        vm.remove(device)
    vm.check_output(WAIT_FOR.format("[ ! -b /dev/vda ]") + "; " + WAIT_FOR.format("[ ! -d /sys/class/net/eth1 ]"))


def test_nics_on_taps_of_somebody_else_s_have_macs_of_their_own(boot, two_taps):
    vm = boot(hotplug=True, networks=[])
    first, second = (vm.add_network(Tap(name)) for name in two_taps)
    there = WAIT_FOR.format("[ -d /sys/class/net/eth1 ]")
    macs = vm.check_output(f"{there}; cat /sys/class/net/eth*/address").split()
    assert sorted(macs) == sorted([first.mac, second.mac])
    assert len(set(macs)) == 2
    # Of those that are there, not of those that were.
    vm.remove(first)
    vm.check_output(WAIT_FOR.format(f"! grep -q {first.mac} /sys/class/net/*/address"))
    assert vm.add_network(Tap(two_taps[0])).mac not in (None, second.mac)


def test_a_vmm_that_ends_while_a_device_goes_is_an_error_at_once(boot, disk):
    vm = boot(hotplug=True, network="none")
    device = vm.add_disk(disk)
    # Its guest lets go of nothing.
    vm.pause()
    killer = threading.Timer(1.0, os.kill, (vm.pid, signal.SIGKILL))
    killer.start()
    at_once = Deadline.after(AT_ONCE_S)
    with pytest.raises((HypervisorError, VmIOError)):
        vm.remove(device)
    killer.cancel()
    assert not at_once.expired


def test_processors_and_memory_grow_while_the_vm_runs(boot):
    vm = boot(max_cpus=2, max_memory_mb=512)
    before_kb = int(vm.check_output("sed -n 's/MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo"))
    vm.resize(cpus=2, memory_mb=384)
    online = "echo 1 >/sys/devices/system/cpu/cpu1/online"
    vm.check_output(WAIT_FOR.format("[ -e /sys/devices/system/cpu/cpu1/online ]") + f"; [ $(nproc) = 2 ] || {online}")
    assert vm.check_output("nproc") == "2\n"
    blocks = "for b in /sys/devices/system/memory/memory*; do echo online >$b/state; done 2>/dev/null; "
    grown = "sed -n 's/MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo"
    vm.check_output(WAIT_FOR.format(f"{{ {blocks} [ $({grown}) -gt {before_kb + 10000} ]; }}"))


def test_what_a_vm_was_not_booted_with_room_for_is_refused_in_words(boot, disk, tmp_path):
    vm = boot(network="none")
    for add in (lambda: vm.add_disk(disk), vm.add_network, lambda: vm.add_shared_dir("s", tmp_path)):
        with pytest.raises(UnsupportedError, match="hotplug=True"):
            add()
    with pytest.raises((UnsupportedError, HypervisorError), match=r"max_cpus|refused"):
        vm.resize(cpus=2)

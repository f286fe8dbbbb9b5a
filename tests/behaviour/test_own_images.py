"""Clones of images of one's own: an initramfs, a root disk. The image here is the built-in one, handed over as a user would."""

import functools
import os
import re
import socket
import time
from importlib import resources

import pytest

from pytest_chvm import HostError, Settings, Tap, UnsupportedError, VmConfig, VmState
from pytest_chvm.base.deadline import Deadline
from pytest_chvm.guest.initramfs import Entry, write_cpio
from pytest_chvm.guest.kinds.image import ImageGuest
from pytest_chvm.machine.guest_choice import choose_guest
from tests.relay import CLOUD_HYPERVISOR

CLOCK_ERROR_S = 2.0


@pytest.fixture
def own(boot):
    """`chvm_vm` with an initramfs and a command line of one's own."""
    return functools.partial(boot, initramfs=built_in_initramfs(), cmdline="console=ttyS0 quiet chvm.hostname=of-the-image")


def built_in_initramfs():
    return choose_guest(VmConfig(), Settings.resolve()).config.initramfs


def initramfs_with(file, name, content):
    """Make the built-in initramfs with another file of that name."""
    built_in = built_in_initramfs().read_bytes()
    # Of two archives, the later one's files count (Documentation/driver-api/early-userspace/buffer-format.rst).
    file.write_bytes(built_in + bytes(-len(built_in) % 512) + write_cpio(iter([Entry(name, 0o100755, content)])))
    return file


def test_a_clone_of_an_own_image_is_a_machine_of_its_own(own):
    def identity(vm):
        facts = vm.check_output(
            "cat /sys/class/net/eth0/address /sys/class/net/eth1/address /etc/machine-id /proc/sys/kernel/random/boot_id;"
            "head -c 16 /dev/urandom | od -An -tx1"
        )
        return vm.ip, *facts.splitlines()

    networks = [Tap(), Tap()]
    clones = [own(boot="clone", name=f"number-{number}", networks=networks) for number in range(3)]
    for vm in clones:
        assert vm.origin.boot == "clone"
        before = time.time()
        assert before - 1 - CLOCK_ERROR_S < int(vm.check_output("date +%s")) < time.time() + CLOCK_ERROR_S
        assert vm.check_output("hostname") == "of-the-image\n"
        addresses = vm.check_output("ip -4 -o addr show dev eth0; ip -4 -o addr show dev eth1; ip route").splitlines()
        assert len(addresses) == 6, addresses
        assert f"inet {vm.ip}/" in addresses[0]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((vm.ip, 1), 10)
        assert vm.console.count("CHVM_READY") == 1
    # All but the kernel's own boot id, which nothing can change.
    identities = [identity(vm) for vm in clones]
    for values in zip(*identities, strict=True):
        assert len(set(values)) == 3, values
    vm.check_output("touch /root/gone")
    vm.reboot()
    assert (vm.ip, vm.check_output("ls /root"), vm.status.state) == (identities[-1][0], "", VmState.READY)


def test_the_first_vm_of_an_own_image_is_booted_and_the_next_ones_are_clones(own, tmp_path):
    own = functools.partial(own, cmdline=f"console=ttyS0 quiet of={tmp_path.name}-{time.time_ns()}")
    origins = [own(name=f"number-{number}", network="none").origin for number in range(3)]
    assert [origin.boot for origin in origins] == ["cold", "clone", "clone"]
    assert "first of its image" in origins[0].why
    vm = own(name="unwatched", network="none", wait=False)
    assert vm.origin.in_words == "booted: it is an image of its own, whose boot is not waited for"


def test_an_own_image_that_boots_and_whose_clone_fails_is_not_cloned_again(own, tmp_path):
    own = functools.partial(own, cmdline=f"console=ttyS0 quiet of={tmp_path.name}-{time.time_ns()}", network="none")
    saved = own(boot="clone", name="fit").origin.saved
    for file in saved.glob("state*"):
        was = file.stat()
        file.write_bytes(bytes(was.st_size))
        os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    for name in ("finds-out", "knows"):
        vm = own(name=name)
        assert vm.origin.boot == "cold"
        assert vm.check_output("echo on") == "on\n"
    assert re.match("booted: a clone of it failed, and then it booted: .*VM 'finds-out'", vm.origin.in_words)
    # Who insists has it made anew.
    assert own(boot="clone", name="insists").origin.boot == "clone"


def test_an_own_image_can_be_saved_again_and_again(own):
    vm = own(boot="cold")
    vm.check_output("echo loaded >/root/database")
    first = vm.snapshot().clone()
    assert first.check_output("cat /root/database; echo changed >/root/database") == "loaded\n"
    second = first.snapshot().clone()
    assert second.check_output("cat /root/database") == "changed\n"
    assert len({vm.ip, first.ip, second.ip}) == 3


def test_clones_have_what_was_written_to_the_root_disk_and_write_to_it_themselves(own, vmm, tmp_path):
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"base" + bytes((8 << 20) - 4))
    # As an image's boot does; that it is not flushed is the harder case.
    writes = b"until [ -b /dev/vda ]; do sleep 0.05; done\nprintf boot | dd of=/dev/vda bs=1M seek=3 conv=notrunc 2>/dev/null\n"
    set_up = resources.files("pytest_chvm.guest").joinpath("configure.sh").read_bytes()
    initramfs = initramfs_with(tmp_path / "initramfs", "lib/chvm/configure.sh", writes + set_up)
    own = functools.partial(own, initramfs=initramfs, root_disk=disk, network="none")
    vm = own(boot="clone", name="first")
    # Written, and only in the guest's memory: both are the clones'.
    vm.check_output(
        "printf one | dd of=/dev/vda bs=1M seek=1 conv=notrunc,fsync; printf two | dd of=/dev/vda bs=1M seek=2 conv=notrunc"
    )

    def pieces(vm):
        return vm.check_output(
            "for n in 0 1 2 3 4; do dd if=/dev/vda bs=1M skip=$n count=1 2>/dev/null | head -c 4 | tr '\\0' .; done"
        )

    if vmm == CLOUD_HYPERVISOR:
        assert pieces(vm) == "baseone.two.boot...."
        assert pieces(own(boot="clone", name="last")) == "base........boot...."
        assert not any(disk.read_bytes()[4:])
        with pytest.raises(UnsupportedError, match="has all of a root disk in its file only when it has ended"):
            vm.snapshot()
        return
    snapshot = vm.snapshot()
    vm.check_output("printf vvv | dd of=/dev/vda bs=1M seek=4 conv=notrunc,fsync")
    clone = snapshot.clone()
    assert pieces(clone) == "baseone.two.boot...."
    clone.check_output("printf new | dd of=/dev/vda bs=1M seek=1 conv=notrunc,fsync")
    again = clone.snapshot()
    # What a snapshot stands on is the image, not the snapshot before it.
    assert snapshot.close() == []
    with pytest.raises(HostError, match=r"is gone: close a snapshot after its clones have been saved"):
        clone.snapshot()
    clone.close()
    assert pieces(again.clone()) == "basenew.two.boot...."
    assert pieces(vm) == "baseone.two.bootvvv."
    assert pieces(own(boot="clone", name="last")) == "base........boot...."
    assert disk.read_bytes()[:4] == b"base"
    assert not any(disk.read_bytes()[4:])


def test_a_vm_whose_clones_would_not_be_as_it_is_cannot_be_saved(own):
    vm = own(boot="cold", networks=[Tap(), Tap()])
    vm.check_output("ip addr flush dev eth1")
    with pytest.raises(UnsupportedError, match="its NIC number 1 does not have the address that it was told"):
        vm.snapshot()
    vm.check_output("udhcpc -i eth0 -f -t 1000 -s /bin/true >/dev/null 2>&1 &")
    with pytest.raises(UnsupportedError, match="its network is managed by udhcpc"):
        vm.snapshot()
    assert vm.check_output("echo on") == "on\n"


def test_an_image_without_a_shell_is_booted_each_time_and_says_why(boot, tmp_path):
    init = b"#!/bin/sh\nmount -t devtmpfs dev /dev\necho CHVM_READY 127.0.0.1 >/dev/ttyS0\nwhile :; do sleep 1000; done\n"
    silent = initramfs_with(tmp_path / "silent", "init", init)
    own = functools.partial(boot, initramfs=silent, cmdline="console=ttyS0 quiet", network="none")
    clock = Deadline.after(1000)
    with pytest.raises(UnsupportedError, match="no shell answers"):
        own(boot="clone", name="insists")
    found_out_s = clock.total_s - clock.remaining_s
    assert found_out_s > ImageGuest.connect_timeout_s
    # It is not tried again: a boot alone is shorter.
    clock = Deadline.after(1000)
    vm = own(name="goes-on")
    assert vm.origin.boot == "cold"
    assert "no shell answers" in vm.origin.why
    assert clock.total_s - clock.remaining_s < found_out_s

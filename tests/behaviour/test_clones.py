"""VMs that are clones of a booted one, and snapshots of a test's own, with both VMMs."""

import functools
import ipaddress
import re
import secrets
import shutil
import socket
import subprocess
import time

import pytest

from pytest_chvm import GuestCommandError, Tap, UnsupportedError, VmIOError, VmState
from pytest_chvm.base.cache import default_cache_dir
from pytest_chvm.base.progress import show_progress
from pytest_chvm.guest.kernels.default import fetch_kernel_package
from pytest_chvm.guest.packages import PackageError
from tests.behaviour.looks import COMPLAINTS, look

KERNEL_WITH_VMGENID = "linux-image-6.12-cloud-amd64"
# Of a machine with much to do; `benchmarks/clones.py` measures it on an idle one.
CLOCK_ERROR_S = 0.5


@pytest.fixture(scope="module")
def clones(chvm_vm_factory, vmm):
    """Two clones of one template, alive at once."""
    with (
        chvm_vm_factory(vmm=vmm, name=f"one-{vmm}", boot="clone") as one,
        chvm_vm_factory(vmm=vmm, name=f"two-{vmm}", boot="clone") as two,
    ):
        yield one, two


def test_clones_are_machines_of_their_own(clones):
    def identity(vm):
        nic = vm.check_output("cat /sys/class/net/eth0/address")
        return vm.ip, nic, vm.check_output("hostname"), vm.check_output("cat /etc/machine-id"), vm.handle.nonce

    one, two = (identity(vm) for vm in clones)
    assert all(a != b for a, b in zip(one, two, strict=True)), (one, two)
    assert one[2] == f"{clones[0].name}\n"


@pytest.fixture(scope="module")
def looks(clones, chvm_vm_factory, vmm):
    """What a booted VM and two clones show of themselves."""
    with chvm_vm_factory(vmm=vmm, name=f"booted-{vmm}", boot="cold") as booted:
        shown = look(booted)
    return [shown, *map(look, clones)]


@pytest.mark.parametrize(
    "fact", ["btf", "clocksource", "devices", "entropy", "interrupts", "kaslr", "modules", "perf", "rcu", "taint", "tsc"]
)
def test_a_clone_is_as_a_booted_vm_in(looks, fact):
    booted, *clones = (shown[fact] for shown in looks)
    assert booted
    assert clones == [booted, booted]


def test_a_clones_kernel_has_been_told_what_a_booted_ones_has(looks):
    """But for this plugin's own words on its command line."""
    booted, *clones = looks
    for clone in clones:
        assert clone["cmdline"] == booted["cmdline"] != ""
        assert clone["dmesg"][0] == booted["dmesg"][0]
        assert [line for line in clone["dmesg"] if COMPLAINTS.search(line)] == []


def test_a_clones_clocks_go_on_from_where_it_was_saved(looks):
    for shown in looks:
        (uptime_s, time_s), (later_s, later_time_s) = shown["clocks"], shown["clocks_later"]
        # However old the template is.
        assert uptime_s < 300
        assert later_s - uptime_s >= 0.99
        assert later_time_s - time_s == pytest.approx(later_s - uptime_s, abs=0.1)


def test_a_clone_has_a_boot_id_and_a_mac_of_its_own_and_the_dmi_uuid_of_its_template(looks, vmm):
    for fact in ("boot_id", "mac"):
        assert len({shown[fact] for shown in looks}) == 3, looks
    booted, one, two = (shown["dmi_uuid"] for shown in looks)
    assert one == two
    assert (booted != one) == (vmm == "qemu")


def test_what_a_clone_is_not_true_in_is_a_reason_for_a_boot(boot):
    wanted = functools.partial(boot, network="none", clone_must_have=["uptime", "cmdline"])
    with pytest.raises(UnsupportedError, match=r"cannot be a clone: clone_must_have has 'cmdline': the words for this plugin"):
        wanted(boot="clone")
    with wanted(name="true-to-its-words") as vm:
        assert (vm.origin.boot, vm.origin.why.partition(":")[0]) == ("cold", "clone_must_have has 'cmdline'")
        assert f"chvm.hostname={vm.name}" in vm.check_output("cat /proc/cmdline").split()
    with boot(network="none", clone_must_have=["uptime", "boot_id"]) as vm:
        assert vm.origin.boot == "clone"


def test_a_clone_has_all_of_its_own_command_line(boot):
    with boot(network="none", boot="clone", cmdline_extra="first.option=1 second=two") as vm:
        assert " first.option=1 second=two " in vm.check_output("cat /proc/cmdline")


def test_clones_draw_different_random_numbers_from_the_start(boot):
    def drawn():
        with boot(boot="clone", network="none") as vm:
            return vm.check_output("head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/boot_id").split("\n")

    streams = [drawn() for _ in range(4)]
    assert len({stream[0] for stream in streams}) == 4, streams
    assert len({stream[1] for stream in streams}) == 4, streams


def test_a_clones_kernel_reseeds_itself_where_the_vmm_can_tell_it(chvm_vm):
    """Cloud Hypervisor has nothing to tell it by, and Debian 12's own kernel not the driver."""
    try:
        tree = fetch_kernel_package(KERNEL_WITH_VMGENID, default_cache_dir() / "newer", show_progress)
    except PackageError as error:
        pytest.skip(f"no kernel with CONFIG_VMGENID: {error}")
    (kernel,) = (tree / "boot").glob("vmlinuz-*")
    for boot, times in (("cold", 0), ("clone", 1)):
        with chvm_vm(vmm="qemu", kernel=kernel, boot=boot, network="none") as vm:
            assert vm.check_output("dmesg").count("crng reseeded due to virtual machine fork") == times


def test_a_clone_has_the_hosts_time(clones):
    for vm in clones:
        before = time.time()
        seconds, microseconds = re.findall(r"tv_u?sec: +(\d+)", vm.check_output("adjtimex"))
        guest = int(seconds) + int(microseconds) / 1e6
        assert before - CLOCK_ERROR_S < guest < time.time() + CLOCK_ERROR_S


def test_a_clone_has_nothing_of_its_siblings(clones):
    one, two = clones
    one.check_output("echo mine >/root/file; mkdir /tmp/dir; sleep 1000 >/dev/null 2>&1 &")
    assert two.check_output("ls /root /tmp") == "/root:\n\n/tmp:\n"
    assert two.run("pidof sleep").returncode == 1


def test_a_clone_is_reachable_and_has_only_its_own_address(clones):
    for vm in clones:
        addresses = vm.check_output("ip -4 addr show dev eth0 | grep -c inet")
        assert addresses == "1\n"
        assert f"inet {vm.ip}/" in vm.check_output("ip -4 addr show dev eth0")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((vm.ip, 1), 10)


def test_a_clones_console_has_its_own_ready_line(clones):
    for vm in clones:
        assert vm.origin.boot == "clone"
        assert f"{vm.ip} nonce={vm.handle.nonce}\n" in vm.console.replace("\r", "")
        assert vm.console.count("CHVM_READY") == 1


def test_clones_have_shared_dirs_of_their_own(boot, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    one = boot(boot="clone", network="none", shared_dirs={"dir": tmp_path / "a"})
    two = boot(boot="clone", network="none", shared_dirs={"dir": tmp_path / "b"})
    assert one.check_output("cat /mnt/dir/which; echo written >/mnt/dir/by-guest") == "a"
    assert two.check_output("cat /mnt/dir/which") == "b"
    assert (tmp_path / "a" / "by-guest").read_text() == "written\n"
    assert not (tmp_path / "b" / "by-guest").exists()


def test_a_snapshot_has_what_the_test_set_up(boot, tmp_path):
    (tmp_path / "code").write_text("shared")
    vm = boot(shared_dirs={"dir": tmp_path})
    vm.check_output(
        "echo the set-up of $$ >/dev/ttyS0; echo loaded >/root/database; sleep 1000 >/dev/null 2>&1 & echo $! >/run/pid"
    )
    snapshot = vm.snapshot()
    # It goes on, with all it had.
    assert vm.check_output("kill -0 $(cat /run/pid) && cat /root/database /mnt/dir/code") == "loaded\nshared"
    first = snapshot.clone()
    first.check_output("echo changed >/root/database")
    second = snapshot.clone()
    assert second.check_output("kill -0 $(cat /run/pid) && cat /root/database /mnt/dir/code") == "loaded\nshared"
    assert len({vm.ip, first.ip, second.ip}) == 3
    assert second.check_output("hostname") == f"{second.name}\n"
    # A snapshot of a clone of a snapshot.
    third = first.snapshot().clone()
    assert third.check_output("cat /root/database") == "changed\n"
    # The saved VM's console, then its own.
    assert re.search(r"the set-up of \d+\r?\n(.*\n)*CHVM_READY", third.console), third.console


def test_a_template_that_is_deleted_while_clones_run_is_made_again(boot):
    # Of a size that no other test has, whose template this would be.
    one = boot(boot="clone", memory_mb=200, network="none")
    content = "cat /bin/busybox $(cat /lib/chvm-modules) | md5sum"
    expected = one.check_output(content)
    shutil.rmtree(one.origin.saved)
    two = boot(boot="clone", memory_mb=200, network="none")
    assert [vm.check_output(content) for vm in (one, two)] == [expected] * 2
    assert two.origin.saved == one.origin.saved
    assert two.origin.saved.is_dir()


def test_a_vm_that_was_booted_can_be_saved_too(boot):
    vm = boot(boot="cold", network="none", hotplug=True)
    vm.check_output("echo loaded >/root/database")
    vm.check_output("sleep 1000 >/dev/null 2>&1 & echo $! >/run/pid")
    # What the last command left running goes on, in both.
    for each in (vm.snapshot().clone(), vm):
        assert each.check_output("kill -0 $(cat /run/pid) && cat /root/database") == "loaded\n"


def test_a_clone_reboots_as_itself(boot):
    vm = boot(boot="clone")
    address, name = vm.ip, vm.check_output("hostname")
    vm.check_output("touch /root/gone")
    vm.reboot()
    assert (vm.ip, vm.check_output("hostname"), vm.check_output("ls /root")) == (address, name, "")
    assert vm.status.state is VmState.READY


def test_a_vm_that_cannot_be_a_clone_is_booted_and_says_why(chvm_vm):
    boot = functools.partial(chvm_vm, vmm="qemu", network="none", channels=["a"])
    with pytest.raises(UnsupportedError, match=r"cannot be a clone: it has channels"):
        boot(boot="clone")
    vm = boot()
    assert (vm.origin.boot, vm.origin.why) == ("cold", "it has channels")
    with pytest.raises(UnsupportedError, match=r"cannot be saved: it has channels"):
        vm.snapshot()


def test_clones_have_the_seed_of_the_vm_that_was_saved(boot, tmp_path):
    seed, other = tmp_path / "seed.iso", tmp_path / "other.iso"
    for file, text in ((seed, b"one"), (other, b"two")):
        file.write_bytes(text + bytes((1 << 20) - 3))
    for file, text in ((seed, "one"), (other, "two"), (seed, "one")):
        vm = boot(boot="clone", network="none", seed_iso=file)
        assert vm.check_output("head -c 3 /dev/vda") == text


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_clone_has_its_data_disk(boot, tmp_path, form):
    disk = tmp_path / f"data.{form}"
    subprocess.run(["qemu-img", "create", "-q", "-f", form, disk, "4M"], check=True)
    vm = boot(boot="clone", network="none", data_disk=disk)
    vm.check_output("printf kept >/dev/vda; sync")
    vm.reboot()
    assert vm.check_output("head -c 4 /dev/vda") == "kept"
    with pytest.raises(UnsupportedError, match=r"cannot be saved: it has data_disk"):
        vm.snapshot()
    vm.shutdown()
    with boot(boot="clone", name="again", network="none", data_disk=disk) as again:
        assert again.check_output("head -c 4 /dev/vda; cat /sys/block/vda/size") == "kept8192\n"


def test_a_vm_with_several_shared_dirs_can_be_saved_again_and_again(boot, tmp_path):
    for tag in ("one", "two"):
        (tmp_path / tag).mkdir()
        (tmp_path / tag / "which").write_text(tag)
    vm = boot(boot="clone", network="none", shared_dirs={"one": tmp_path / "one", "two": tmp_path / "two"})
    vm.remove(vm.add_shared_dir("three", tmp_path))
    vm.check_output("cd /mnt/two; sleep 1000 >/dev/null 2>&1 & echo $! >/run/pid")
    with pytest.raises(GuestCommandError, match="umount"):
        vm.snapshot()
    assert vm.check_output("cat /mnt/*/which; kill $(cat /run/pid)") == "onetwo"
    first, second = vm.snapshot(), vm.snapshot()
    assert vm.check_output("cat /mnt/*/which") == "onetwo"
    # Both alive: they have names of their own.
    clones = [first.clone(), second.clone()]
    assert [clone.check_output("cat /mnt/*/which") for clone in clones] == ["onetwo", "onetwo"]


def test_what_a_clone_could_not_be_is_refused_by_the_snapshot(boot):
    vm = boot(boot="clone", network="none", max_cpus=2)
    snapshot = vm.snapshot()
    assert snapshot.close() == []
    with pytest.raises(VmIOError, match="was closed"):
        snapshot.clone()
    vm.pause()
    with pytest.raises(UnsupportedError, match=r"is paused: resume\(\) it first"):
        vm.snapshot()
    assert vm.status.state is VmState.PAUSED
    vm.resume()
    vm.resize(cpus=2)
    with pytest.raises(UnsupportedError, match="was resized"):
        vm.snapshot()


def test_a_clones_nic_has_nothing_of_the_templates(boot, vmm):
    def addresses(vm):
        return vm.check_output("ip -o addr show dev eth0; ip route")

    vm = boot(boot="clone", name=f"another-{vmm}")
    mac = bytes.fromhex(vm.check_output("cat /sys/class/net/eth0/address").replace(":", ""))
    # RFC 4291, appendix A.
    link_local = ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + bytes([mac[0] ^ 2, *mac[1:3], 0xFF, 0xFE, *mac[3:]]))
    # The kernel makes it once it has noticed the carrier, up to a second after.
    vm.check_output("until ip addr show dev eth0 | grep -q inet6; do usleep 10000; done", timeout=10)
    assert f"inet6 {link_local}/64" in addresses(vm)
    # Of a TAP of somebody else's without an address of the host's the guest's is not known either.
    tap = f"chvmt{secrets.token_hex(3)}"
    subprocess.run(["ip", "tuntap", "add", "dev", tap, "mode", "tap"], check=True)
    try:
        vm = boot(boot="clone", networks=[Tap(tap)])
        assert (vm.ip, addresses(vm)) == ("127.0.0.1", "")
        vm.close()
    finally:
        subprocess.run(["ip", "link", "del", tap], check=True)

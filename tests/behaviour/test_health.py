"""What befalls a guest and its helpers is seen, and what only looks like it is not."""

import os
import signal
import time

import pytest

from pytest_chvm import GuestPanicError, GuestRebootError, HypervisorError, VmIOError
from pytest_chvm.base.deadline import Deadline, wait_readable

PANIC_TEXT = "[   12.345678] Kernel panic - not syncing: of an old log"
CRASH = "echo c >/proc/sysrq-trigger; sleep 60"


@pytest.fixture
def image(boot):
    """The built-in guest as an image of one's own: nothing is known of its panic device."""
    with boot(network="none") as vm:
        return {"kernel": vm.config.kernel, "initramfs": vm.config.initramfs, "cmdline": "console=ttyS0 quiet"}


def test_the_text_of_a_panic_on_a_living_guest_s_console_is_none(boot):
    vm = boot(network="none")
    vm.check_output(f"echo '{PANIC_TEXT}' >/dev/ttyS0; sleep 1")
    assert vm.check_output("echo alive") == "alive\n"
    assert vm.machine.check_up() is None


def test_nor_is_it_in_a_guest_of_which_nothing_is_known(boot, image):
    vm = boot(**image, network="none", boot="cold")
    vm.check_output(f"echo '{PANIC_TEXT}' >/dev/ttyS0; sleep 1")
    assert vm.check_output("echo alive") == "alive\n"
    vm.check_output("rmmod pvpanic_pci")
    started = time.monotonic()
    with pytest.raises(GuestPanicError, match="sysrq triggered crash"):
        vm.run(CRASH, timeout=60)
    assert time.monotonic() - started < 30


def test_a_panic_that_is_not_on_the_serial_console_is_one(boot):
    vm = boot(network="none", cmdline="console=tty0 quiet")
    with pytest.raises(GuestPanicError, match="panic device"):
        vm.run(CRASH, timeout=60)
    assert "Kernel panic" not in vm.console


def test_an_expected_panic_is_no_error_and_the_guest_may_start_again(boot):
    vm = boot(network="none")
    vm.check_output("echo 1 >/proc/sys/kernel/panic; touch /tmp/gone")
    with vm.expect_panic():
        vm.run(CRASH)
    assert vm.machine.check_up() is None
    vm.wait_ready()
    assert vm.run("test -e /tmp/gone").returncode == 1
    # From now on all is as before.
    with pytest.raises(GuestRebootError):
        vm.run("reboot -f; sleep 60", timeout=60)


def test_a_guest_that_stays_down_after_an_expected_panic_says_so(boot):
    vm = boot(network="none")
    with vm.expect_panic():
        vm.run("(sleep 1; echo c >/proc/sysrq-trigger) >/dev/null 2>&1 &")
    assert vm.machine.check_up() is None
    with pytest.raises(GuestPanicError, match="as expected"):
        vm.run("true")


def test_a_panic_that_was_expected_and_does_not_come_is_an_error(boot):
    vm = boot(network="none")
    with pytest.raises(VmIOError, match=r"did not panic within 0\.5 s"), vm.expect_panic(timeout=0.5):
        pass
    assert vm.check_output("echo alive") == "alive\n"


def test_a_reboot_after_one_that_was_asked_for_is_an_error(boot):
    vm = boot(network="none")
    vm.reboot()
    assert vm.check_output("echo alive") == "alive\n"
    with pytest.raises(GuestRebootError):
        vm.run("reboot -f; sleep 60", timeout=60)


def test_a_virtiofsd_that_dies_is_noticed_after_a_hotplug_and_a_reboot(boot, tmp_path):
    for tag in ("first", "plugged"):
        (tmp_path / tag).mkdir()
    vm = boot(shared_dirs={"first": tmp_path / "first"}, hotplug=True, network="none")
    vm.reboot()
    device = vm.add_shared_dir("plugged", tmp_path / "plugged")
    vm.check_output("mkdir -p /mnt/plugged; mount -t virtiofs plugged /mnt/plugged")
    assert vm.machine.check_up() is None
    os.kill(device.sidecar.pid, signal.SIGKILL)
    with pytest.raises(HypervisorError, match=r"virtiofsd .* for shared dir 'plugged' .* signal 9"):
        vm.run("sleep 60", timeout=40)


def test_a_guest_s_clock_is_right_after_a_pause(boot):
    vm = boot(network="none")
    before = time.time()
    vm.pause()
    # All that is waited for is time.
    assert not wait_readable([], Deadline.after(3))
    vm.resume()
    assert int(vm.check_output("date +%s")) >= int(before) + 3

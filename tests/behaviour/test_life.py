"""From boot to the end of a VM, with both VMMs."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pytest_chvm import (
    BootFailedError,
    GuestPanicError,
    GuestRebootError,
    GuestShutdownError,
    HypervisorError,
    InvalidConfigError,
    VmHandle,
    VmIOError,
    VmState,
)
from pytest_chvm.base.deadline import Deadline, wait_readable
from pytest_chvm.host.keeper.remains import start_time_ticks


def test_a_vm_is_ready_with_the_ip_that_its_guest_has(vm):
    assert vm.status.state is VmState.READY
    assert vm.status.ip == vm.ip
    assert f"inet {vm.ip}/" in vm.check_output("ip -4 addr show dev eth0")
    # Both logs are where a person looks, and asking has changed nothing.
    assert vm.wait_for_console("CHVM_READY (.*) nonce").group(1) == vm.ip
    assert vm.vmm_log == vm.serial_log.with_suffix(".vmm.log")
    assert vm.vmm_log.exists()


def test_a_vm_has_its_name_alone(vm, boot):
    with pytest.raises(InvalidConfigError, match="is running already"):
        boot(name=vm.name, namespace=vm.handle.namespace)
    assert vm.status.state is VmState.READY


def test_the_power_button_is_the_guests_to_heed(vm):
    vm.machine.driver.power_button(vm.handle)
    assert vm.check_output("echo on") == "on\n"


def test_a_guest_that_is_late_is_an_error_that_says_what_was_waited_for(boot):
    with pytest.raises(BootFailedError, match=r"was not ready within 0.3 s: expected a line 'CHVM_READY IP'"):
        boot(boot="cold", boot_timeout=0.3)


def test_the_guest_is_reachable_at_its_address(vm):
    import urllib.request

    vm.check_output("mkdir -p /tmp/www && echo hello >/tmp/www/index.html && httpd -p 8080 -h /tmp/www")
    host, port = vm.address(8080)
    with urllib.request.urlopen(f"http://{host}:{port}/", timeout=10) as answer:
        assert answer.read() == b"hello\n"
    vm.run("killall httpd")


def test_a_handle_survives_json(vm):
    assert VmHandle.from_json(vm.handle.to_json()) == vm.handle


def test_a_paused_vm_says_so_and_goes_on_when_resumed(vm):
    vm.pause()
    assert vm.status.state is VmState.PAUSED
    vm.resume()
    assert vm.status.state is VmState.READY
    assert vm.check_output("echo on") == "on\n"


def test_the_vmm_tells_of_itself(vm):
    assert vm.info()
    assert isinstance(vm.counters(), dict)


def test_a_reboot_is_a_new_boot_of_the_same_vm(boot, tmp_path):
    (tmp_path / "kept").write_text("still here")
    vm = boot(shared_dirs={"host": tmp_path})
    first = vm.check_output("cat /proc/sys/kernel/random/boot_id")
    vm.run("touch /tmp/gone")
    vm.reboot()
    assert vm.check_output("cat /proc/sys/kernel/random/boot_id") != first
    assert vm.run("test -e /tmp/gone").returncode == 1
    assert vm.check_output("cat /mnt/host/kept") == "still here"
    vm.shutdown()
    assert vm.status.state is VmState.STOPPED


def test_a_guest_that_powers_itself_off_is_an_error_at_once(boot):
    vm = boot()
    with pytest.raises((GuestShutdownError, HypervisorError)):
        vm.run("poweroff -f; sleep 60", timeout=40)


def test_a_guest_that_reboots_unasked_is_an_error_at_once(boot):
    vm = boot()
    with pytest.raises(GuestRebootError):
        vm.run("reboot -f; sleep 60", timeout=40)


def test_a_panic_is_an_error_at_once_and_names_itself(boot):
    vm = boot()
    with pytest.raises(GuestPanicError, match="panic"):
        vm.run("echo c >/proc/sysrq-trigger; sleep 60", timeout=40)


def test_a_kernel_without_init_fails_with_the_panic(boot):
    with pytest.raises(GuestPanicError, match="not syncing"):
        boot(cmdline="console=ttyS0 rdinit=/nonexistent")


def test_a_vmm_that_is_killed_is_an_error_at_once_with_the_signal(boot):
    vm = boot()
    os.kill(vm.pid, signal.SIGKILL)
    with pytest.raises(HypervisorError, match="signal 9"):
        vm.run("sleep 60", timeout=40)


def test_a_vmm_that_refuses_to_start_says_why_and_how_to_repeat_it(boot, tmp_path):
    junk = tmp_path / "vmlinux"
    junk.write_bytes(b"\x7fELF" + bytes(8000))
    initramfs = tmp_path / "initramfs"
    initramfs.write_bytes(bytes(512))
    with pytest.raises(BootFailedError) as failure:
        boot(kernel=junk, initramfs=initramfs)
    assert "ended with status" in str(failure.value)
    assert "To repeat it:" in str(failure.value)


def test_stop_ends_the_vmm_and_its_run_directory(boot):
    vm = boot()
    pid, run_dir = vm.pid, vm.handle.run_dir
    vm.stop()
    assert start_time_ticks(pid) is None
    assert not run_dir.exists()
    assert vm.status.state is VmState.STOPPED


def test_a_vm_that_several_threads_end_ends_once_and_each_returns_when_it_has(boot):
    vm = boot()
    pid, run_dir, all_at_once = vm.pid, vm.handle.run_dir, threading.Barrier(5)

    def end(how):
        all_at_once.wait()
        how()
        return start_time_ticks(pid), run_dir.exists()

    with ThreadPoolExecutor(6) as executor:
        waiting = executor.submit(vm.wait_for_console, "never")
        assert list(executor.map(end, [vm.kill, vm.stop, vm.close, vm.shutdown, vm.kill])) == [(None, False)] * 5
        with pytest.raises(VmIOError, match="was ended by the test"):
            waiting.result()
    assert [event.kind for event in vm.events].count("ended") == 1
    assert vm.closed


def test_a_reboot_that_another_thread_ends_says_so(boot):
    vm = boot()
    with ThreadPoolExecutor(1) as executor:
        rebooting = executor.submit(vm.reboot)
        vm.wait_for_console("Restarting system")
        vm.kill()
        with pytest.raises(VmIOError, match="was ended by the test"):
            rebooting.result()


def test_stop_needs_no_agreement_of_a_hung_guest(boot):
    vm = boot()
    pidfd = os.pidfd_open(vm.pid)
    vm.pause()
    vm.stop()
    assert wait_readable([pidfd], Deadline.after(1))
    os.close(pidfd)

"""What the guest's kernel says: its log, and its reports of bugs of its own."""

import pytest

from pytest_chvm import GuestPanicError, VmIOError

# The stock kernel then reports a failed allocation with its stack, once in ten seconds.
SPLAT = "echo 268435456 >/proc/sys/net/core/rps_sock_flow_entries"
TITLE = "vmalloc error: size 1073741888"


def said(number):
    """Return a command that has the kernel's log say that something is wrong with the kernel, each with another number."""
    return f"echo 'WARNING: CPU: 0 PID: {number} at kernel/test.c:{number} test+0x1/0x2' >/dev/kmsg"


def titles(vm):
    """Return the titles of what `said` has had it say: of a processor made of software a kernel may complain when it boots."""
    return [splat.title for splat in vm.machine.take_splats() if "kernel/test.c" in splat.title]


def test_a_bug_that_the_kernel_reports_is_known_whole_with_the_command_that_ran(boot):
    vm = boot(network="none")
    vm.run("true")
    vm.run(SPLAT)
    vm.run("true")
    (splat,) = [splat for splat in vm.machine.take_splats() if TITLE in splat.title]
    assert "Call Trace:" in splat.text
    assert "rps_sock_flow_sysctl" in splat.text
    assert "Mem-Info:" in splat.text
    assert (splat.kind, splat.commands, splat.taint is None) == ("page allocation failure", (SPLAT,), False)
    assert "virtio_console" in splat.modules
    assert vm.machine.take_splats() == []
    # It is no news of a clone's, and the clone's is none of its own.
    with vm.snapshot().clone() as clone:
        clone.run(said(1))
        assert titles(clone) == ["WARNING: CPU: 0 PID: 1 at kernel/test.c:1 test+0x1/0x2"]
    assert titles(vm) == []


def test_the_log_has_times_levels_and_facilities(boot):
    vm = boot(network="none")
    assert vm.run("echo '<28>test: of a daemon' >/dev/kmsg").returncode == 0
    messages = vm.dmesg()
    assert any(message.text.startswith("Linux version ") and message.facility == 0 for message in messages)
    last = messages[-1]
    assert (last.level, last.facility, last.text) == (4, 3, "test: of a daemon")
    assert last.time_s > 0


def test_what_a_program_writes_to_the_console_is_no_splat(vm):
    vm.run("echo '[    1.234567] WARNING: CPU: 0 PID: 7 at kernel/test.c:7 test+0x1/0x2' >/dev/ttyS0")
    assert titles(vm) == []


def test_a_quiet_guest_s_splats_are_seen(boot):
    vm = boot(network="none", cmdline="console=ttyS0 quiet")
    vm.run(said(1))
    assert len(titles(vm)) == 1


def test_a_splat_in_a_process_beside_the_test_is_that_one_s(vm):
    with vm.popen(f"read line; {said(2)}; sleep 1000", input="go\n") as process:
        vm.wait_until("dmesg | grep -q 'PID: 2 at'")
        (splat,) = vm.machine.take_splats()
    assert process.command in splat.commands


def test_an_expected_splat_is_none_of_the_test_s(vm):
    with vm.expect_splat(r"PID: 3 at kernel/test\.c") as expected:
        vm.run(said(3))
        vm.run(said(4))
    assert expected.splat.commands == (said(3),)
    assert titles(vm) == ["WARNING: CPU: 0 PID: 4 at kernel/test.c:4 test+0x1/0x2"]


def test_an_expected_splat_that_comes_late_is_waited_for(vm):
    with vm.expect_splat("PID: 5 at"):
        vm.run(f"(sleep 1; {said(5)}) >/dev/null 2>&1 &")
    assert titles(vm) == []


def test_an_expected_splat_that_does_not_come_is_an_error_that_says_what_did(vm):
    with pytest.raises(VmIOError, match=r"no splat that matches 'KASAN' .* within 1 s.*PID: 6 at"), vm.expect_splat("KASAN", 1):
        vm.run(said(6))
    assert len(titles(vm)) == 1


def test_what_came_before_a_reboot_is_known_after_it_and_what_comes_then_too(boot):
    vm = boot(network="none")
    vm.run(said(7))
    vm.reboot()
    vm.run(said(8))
    assert [title.split()[4] for title in titles(vm)] == ["7", "8"]


def test_what_came_before_the_end_is_known_after_it(boot):
    vm = boot(network="none")
    vm.run(said(9))
    vm.kill()
    assert len(titles(vm)) == 1


def test_debugfs_and_tracefs_are_mounted(vm):
    assert (
        vm.run(
            "grep -q ' /sys/kernel/debug debugfs ' /proc/mounts && grep -q ' /sys/kernel/tracing tracefs ' /proc/mounts"
        ).returncode
        == 0
    )


def test_a_panic_in_a_guest_whose_console_is_not_the_serial_port_is_seen_at_once(boot):
    with pytest.raises(GuestPanicError, match=r"Kernel panic|No working init|Attempted to kill init|Requested init"):
        boot(network="none", cmdline="rdinit=/nowhere", boot_timeout=60)


def test_what_an_expected_panic_brings_with_it_is_expected(boot):
    vm = boot(network="none")
    vm.run(said(10))
    with vm.expect_panic():
        vm.run(f"{said(11)}; echo c >/proc/sysrq-trigger; sleep 60")
    assert titles(vm) == ["WARNING: CPU: 0 PID: 10 at kernel/test.c:10 test+0x1/0x2"]


def test_a_task_that_hangs_is_reported_by_the_kernel_itself(boot, tmp_path):
    image = tmp_path / "data.img"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    vm = boot(network="none", data_disk=image)
    vm.check_output("mke2fs /dev/vda && mkdir /data && mount -t ext4 /dev/vda /data")
    vm.check_output("cd /proc/sys/kernel && echo 1 >hung_task_warnings && echo 1 >hung_task_timeout_secs")
    with vm.expect_splat(r"INFO: task touch:\d+ blocked for more than") as expected:
        vm.run("fsfreeze --freeze /data; touch /data/file & sleep 4; fsfreeze --unfreeze /data; wait")
    assert (expected.splat.kind, len(expected.splat.commands)) == ("hung task", 1)
    assert "Call Trace:" in expected.splat.text

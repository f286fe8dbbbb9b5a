"""A guest that prints more than a disk should hold."""

from pytest_chvm.base.deadline import Deadline
from pytest_chvm.base.watch import FileWatch
from pytest_chvm.host import keeper_client

KIB = 1 << 10
# No more, since a serial port that is emulated twice is slow.
PRINT = "dd if=/dev/zero bs=1024 count=48 2>/dev/null | tr '\\0' x >/dev/console"


def test_a_guest_that_prints_without_end_is_heard_and_does_not_fill_the_disk(boot, monkeypatch):
    monkeypatch.setattr(keeper_client, "LOG_BOUND", (32 * KIB, 8 * KIB, 8 * KIB))
    vm = boot(network="none")
    vm.check_output(f"echo early >/dev/console; {PRINT}; echo late >/dev/console", timeout=60)
    deadline = Deadline.after(20)
    with FileWatch(vm.serial_log) as watch:
        while vm.serial_log.stat().st_blocks * 512 > 32 * KIB:
            assert not deadline.expired, vm.serial_log.stat()
            watch.wait(deadline)
    assert vm.serial_log.stat().st_size > 48 * KIB
    for line in ("early", "late"):
        vm.wait_for_console(rf"{line}\r?\n", timeout=20)
    assert vm.run("(sleep 0.2; echo afterwards >/dev/console) &").returncode == 0
    vm.wait_for_console("afterwards", timeout=20)
    assert "afterwards" in vm.console

"""What befalls a VM after the last call of a test, on a disk that is full, or with a kernel that lacks drivers."""

import os
import shutil
import subprocess

import pytest

from pytest_chvm import BootFailedError, HypervisorError, InvalidConfigError, VmState
from pytest_chvm.machine.guest_choice import built_in_kernel
from pytest_chvm.settings import Settings

ENDS = """
import os, signal
import pytest

from pytest_chvm.base.deadline import Deadline, wait_readable
from pytest_chvm.base.watch import FileWatch


def test_panics(chvm_vm):
    vm = chvm_vm(network="none")
    vm.run("(sleep 0.2; echo c >/proc/sysrq-trigger) >/dev/null 2>&1 &")
    # Nothing of ours looks at the VM any more.
    with FileWatch(vm.handle.run_dir / "events.out") as watch:
        while "GUEST_PANICKED" not in (vm.handle.run_dir / "events.out").read_text():
            watch.wait(Deadline.after(20))


def test_loses_its_vmm(chvm_vm_factory):
    vm = chvm_vm_factory(network="none")
    pidfd = os.pidfd_open(vm.pid)
    os.kill(vm.pid, signal.SIGKILL)
    wait_readable([pidfd], Deadline.after(20))


def test_knows_it_already(chvm_vm_factory):
    pass


def test_has_killed_it(chvm_vm):
    chvm_vm(network="none").kill()


def test_has_seen_it(chvm_vm):
    from pytest_chvm import HypervisorError

    vm = chvm_vm(network="none")
    os.kill(vm.pid, signal.SIGKILL)
    with pytest.raises(HypervisorError):
        vm.run("sleep 60")
"""


def test_a_test_fails_for_what_befell_its_vm_after_its_last_call(pytester, user_environment):
    pytester.makepyfile(ENDS)
    result = pytester.runpytest_subprocess("--chvm-vmm=qemu", timeout=120)
    result.assert_outcomes(failed=2, passed=3)
    result.stdout.fnmatch_lines(["*GuestPanicError: *the guest's kernel gave up*", "*HypervisorError: *was killed by signal 9*"])
    result.stdout.fnmatch_lines(["FAILED *::test_panics*", "FAILED *::test_loses_its_vmm*"])


@pytest.fixture
def small_file_system(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "small", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_of_the_host_is_told_at_once_and_can_be_got_over(chvm_vm, small_file_system):
    disk = small_file_system / "data.img"
    with disk.open("wb") as file:
        file.truncate(1 << 30)
    vm = chvm_vm(data_disk=disk, network="none", vmm="qemu")
    with pytest.raises(HypervisorError, match=r"(?s)data\.img.*No space left on device.*resume"):
        vm.run("dd if=/dev/zero bs=1M count=30 | tr '\\0' x | dd of=/dev/vda bs=1M conv=fsync", timeout=60)
    assert vm.status.state is VmState.PAUSED
    subprocess.run(["mount", "-o", "remount,size=80M", small_file_system], check=True)
    vm.resume()
    assert vm.check_output("sync; echo alive", timeout=60) == "alive\n"
    assert vm.status.state is VmState.READY


def test_what_a_guest_writes_to_its_root_disk_is_not_in_run(chvm_vm, tmp_path):
    disk = tmp_path / "root.img"
    with disk.open("wb") as file:
        file.truncate(1 << 30)
    kernel = built_in_kernel(Settings.resolve()).image
    with chvm_vm(network="none") as plain:
        initramfs = plain.config.initramfs
    vm = chvm_vm(kernel=kernel, initramfs=initramfs, root_disk=disk, network="none", boot="cold", cmdline="console=ttyS0 quiet")
    overlay = (vm.handle.run_dir / "root.qcow2").resolve()
    assert overlay.is_file()
    assert not overlay.is_relative_to("/run")
    snapshot = vm.snapshot() if vm.handle.vmm == "qemu" else None
    vm.kill()
    assert not overlay.parent.exists()
    assert snapshot is None or (snapshot.directory / "root.qcow2").is_file()


def test_a_kernel_without_its_modules_is_not_ready_and_says_what_it_lacks(chvm_vm, tmp_path):
    known = built_in_kernel(Settings.resolve())
    kernel = tmp_path / "vmlinuz"
    shutil.copy(known.image, kernel)
    with pytest.raises(BootFailedError, match=rf"(?s)shared dir 'd'.*no modules for {known.release} beside this kernel"):
        chvm_vm(kernel=kernel, shared_dirs={"d": tmp_path}, network="none", boot="cold", cmdline="console=ttyS0 quiet")
    # It needs none for what it is asked to do, but for the console of a shell.
    vm = chvm_vm(kernel=kernel, network="none", boot="cold", cmdline="console=ttyS0 quiet")
    with pytest.raises(OSError, match="no modules for"):
        vm.run("true")


def test_more_devices_than_a_vm_has_room_for_are_refused_before_anything_starts(chvm_vm, tmp_path):
    with pytest.raises(InvalidConfigError, match="a VM has room for 21"):
        chvm_vm(shared_dirs={f"d{number}": tmp_path for number in range(23)}, network="none")

"""A boot that fails says why at once, and leaves nothing: no VMM, sidecar, TAP, socket, directory, lock or name."""

import gc
import os
import re
import shutil
import signal
import subprocess
import threading
import time

import pytest

from pytest_chvm import (
    BootFailedError,
    EarlyGuestPanicError,
    HostError,
    HypervisorError,
    InvalidConfigError,
    MissingRequirementError,
    SharedDir,
    Tap,
    VmConfig,
    VmError,
    VmState,
    launch,
)
from pytest_chvm.base.deadline import Deadline
from pytest_chvm.base.watch import FileWatch
from pytest_chvm.drivers.cloud_hypervisor import driver as cloud_hypervisor
from pytest_chvm.guest.ready import ReadyScanner
from pytest_chvm.host import virtiofsd
from tests.conftest import AT_ONCE_S


@pytest.fixture
def launch_ch(stand_in_ch, fake_kernel, tmp_path):
    """Launch the stand-in as a guest of the user's own, of which nothing but the marker is asked."""

    def start(**config):
        defaults = {"kernel": fake_kernel, "initramfs": fake_kernel, "networks": [], "serial_log": tmp_path / "serial.log"}
        return launch(vmm="cloud-hypervisor", **{**defaults, **config})

    return start


def test_marker_alone_makes_it_ready(launch_ch, stand_in_ch):
    stand_in_ch.does(serial="booting\r\nCHVM_READY 192.0.2.7\r\n")
    with launch_ch() as vm:
        assert (vm.ip, vm.status.state) == ("192.0.2.7", VmState.READY)
        # The API is first touched when something asks for it.
        assert stand_in_ch.requests == []
        vm.pause()
        assert stand_in_ch.requests == ["PUT /api/v1/vm.pause HTTP/1.1"]
        assert vm.status.state is VmState.PAUSED
        vm.resume()
        assert vm.status.state is VmState.READY
        assert stand_in_ch.requests[1:] == ["PUT /api/v1/vm.resume HTTP/1.1"]


def test_marker_of_the_users_own(launch_ch, stand_in_ch):
    stand_in_ch.does(serial="CHVM_READY 192.0.2.1\nVMRS_READY 192.0.2.7\n")
    with launch_ch(ready_marker="VMRS_READY") as vm:
        assert vm.ip == "192.0.2.7"


def test_marker_that_comes_right_after_a_look_is_not_slept_over(launch_ch, stand_in_ch, monkeypatch):
    """A guest that is quiet prints nothing more that would wake the wait."""
    with launch_ch(wait=False) as vm:
        stand_in_ch.record(vm.pid)
        scan = ReadyScanner.scan

        def then_it_comes(scanner):
            found = scan(scanner)
            if not vm.serial_log.stat().st_size:
                vm.serial_log.write_bytes(b"CHVM_READY 192.0.2.7\n")
            return found

        monkeypatch.setattr(ReadyScanner, "scan", then_it_comes)
        at_once = Deadline.after(AT_ONCE_S)
        vm.wait_ready(timeout=2 * AT_ONCE_S)
        assert not at_once.expired


def test_api_that_refuses_is_a_hypervisor_error_with_its_reasons(launch_ch, stand_in_ch):
    stand_in_ch.does(serial="CHVM_READY 192.0.2.7\n", answers={"vm.pause": [500, '["Error pausing", "Not running"]']})
    with launch_ch() as vm:
        with pytest.raises(HypervisorError, match=r"refused 'vm.pause' with status 500: Error pausing: Not running"):
            vm.pause()
        assert vm.status.state is VmState.READY


def test_api_that_answers_nonsense_is_a_hypervisor_error(launch_ch, stand_in_ch):
    stand_in_ch.does(serial="CHVM_READY 192.0.2.7\n", answers={"vm.pause": [200, "<html>"]})
    with launch_ch() as vm, pytest.raises(HypervisorError, match=r"answer to 'vm.pause' makes no sense.*<html>"):
        vm.pause()


def test_early_exit_says_all_there_is_to_know(launch_ch, stand_in_ch, tmp_path, monkeypatch):
    monkeypatch.setattr(cloud_hypervisor, "why_no_kvm", lambda: "/dev/kvm is not there")
    said = "".join(f"line {number}\n" for number in range(100)) + "Cannot open /dev/kvm\x1b[31m!\n"
    stand_in_ch.does(exits_with=1, says=said, serial="early console\n")
    at_once = Deadline.after(AT_ONCE_S)
    with pytest.raises(BootFailedError) as caught:
        launch_ch()
    assert not at_once.expired, "the exit is noticed when it happens, not at the deadline"
    message = str(caught.value)
    (record,) = stand_in_ch.records()
    assert f"pid {record['pid']}" in message
    assert "ended with status 1, before it was ready" in message
    assert str(tmp_path / "serial.vmm.log") in message
    assert "Cannot open /dev/kvm!" in message
    assert "line 99" in message
    assert "line 1\n" not in message, "bounded"
    assert "early console" in message
    assert "\x1b" not in message
    assert f"To repeat it: {stand_in_ch.path} --kernel" in message
    assert "No usable KVM here: /dev/kvm is not there. Use --chvm-vmm=qemu" in message
    assert caught.value.vm_name is not None


def test_no_hint_where_kvm_is_usable(launch_ch, stand_in_ch, monkeypatch):
    monkeypatch.setattr(cloud_hypervisor, "why_no_kvm", lambda: None)
    stand_in_ch.does(exits_with=1)
    with pytest.raises(BootFailedError) as caught:
        launch_ch()
    assert "KVM" not in str(caught.value)


def test_exit_at_any_moment_before_ready_is_noticed_at_once(launch_ch, stand_in_ch):
    vm = launch_ch(wait=False)
    with vm:
        stand_in_ch.record(vm.pid)
        timer = threading.Timer(0.3, os.kill, (vm.pid, signal.SIGUSR1))
        timer.start()
        at_once = Deadline.after(AT_ONCE_S)
        with pytest.raises(BootFailedError, match="ended with status 3"):
            vm.wait_ready()
        assert not at_once.expired
        timer.join()


def test_death_by_a_signal_is_named(launch_ch, stand_in_ch):
    with launch_ch(wait=False) as vm:
        os.kill(vm.pid, signal.SIGSEGV)
        with pytest.raises(BootFailedError, match="was killed by signal 11"):
            vm.wait_ready()


def test_repeated_command_has_no_descriptors(ch, stand_in_ch, needs_taps):
    handle = ch.boot(networks=[Tap()])
    assert "--api-socket" not in handle.command
    assert not [word for word in handle.command if "fd=" in word]


def test_exit_of_real_qemu(guest, tmp_path):
    # A cpu model that there is not: QEMU says so and ends.
    with pytest.raises(BootFailedError, match=r"(?s)ended with status 1.*unable to find CPU model 'none-such'"):
        launch(vmm="qemu", network="none", cpu_model="none-such", serial_log=tmp_path / "serial.log")


def test_deadline_says_what_the_console_said_last(launch_ch, stand_in_ch):
    stand_in_ch.does(serial="Starting \x1b[1msshd\x1b[0m...\r\n")
    started, at_once = time.monotonic(), Deadline.after(AT_ONCE_S)
    with pytest.raises(BootFailedError) as caught:
        launch_ch(boot_timeout=0.5)
    assert time.monotonic() - started > 0.4
    assert not at_once.expired
    message = str(caught.value)
    assert "was not ready within 0.5 s: expected a line 'CHVM_READY IP'" in message
    assert "Starting sshd..." in message
    assert "--chvm-boot-timeout" in message


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("CHVM_READY\n", "had no IP"),
        ("CHVM_READY 192.0.2\n", "'192.0.2' where an IP was expected"),
        ("CHVM_READY 192.0.2.7", "is not a line yet"),
        ("CHVM_READY 192.0.2.7; rm -rf /\n", "where an IP was expected"),
        ("CHVM_READY " + "1" * 100 + "\n", "too long"),
        ("x" * 10_000_000, "no newline"),
        ("CHVM_READY " * 900_000, "marker without newline"),
    ],
    ids=["no-ip", "half-an-ip", "half-a-line", "trailing-garbage", "too-long", "10-MB-without-newline", "10-MB-of-markers"],
)
def test_ready_line_that_does_not_count(launch_ch, stand_in_ch, line, reason):
    stand_in_ch.does(serial=line)
    # Of the processor: how long it takes depends on who else wants one.
    started_s = time.process_time()
    with pytest.raises(BootFailedError) as caught:
        launch_ch(boot_timeout=1.5)
    assert time.process_time() - started_s < 6
    assert "not ready within 1.5 s" in str(caught.value)
    assert len(str(caught.value)) < 20_000
    if "line" not in reason:
        assert reason in str(caught.value)


def test_marker_of_another_vm_is_refused(ch, stand_in_ch):
    from pytest_chvm.drivers.boot import BootOptions

    stand_in_ch.does(serial="CHVM_READY 192.0.2.1 nonce=other\nCHVM_READY 192.0.2.2\n")
    handle = ch.driver.boot(ch.config(), BootOptions(nonce="mine"))
    ch.handles.append(handle)
    stand_in_ch.record(handle.process.pid)
    assert ch.driver.state(handle).state is VmState.RUNNING
    with handle.serial_log.open("a") as log:
        log.write("CHVM_READY 192.0.2.3 nonce=mine\n")
    assert ch.driver.state(handle).ip == "192.0.2.3"


def test_what_no_vm_has_is_a_wrong_argument(launch_ch, stand_in_ch):
    stand_in_ch.does(serial="CHVM_READY 192.0.2.1\n")
    with launch_ch() as vm:
        for ask in (vm.address, vm.vsock, vm.listen_vsock):
            for port in (0, -1, 1 << 32, "80"):
                with pytest.raises(InvalidConfigError, match=r"port=.*: expected 1 to \d+"):
                    ask(port)
        with pytest.raises(InvalidConfigError, match="has no channel 'none'"):
            vm.open_channel("none")


def test_kernel_panic_is_recognised(launch_ch, stand_in_ch):
    stand_in_ch.does(serial="[    1.234567] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n")
    at_once = Deadline.after(AT_ONCE_S)
    with pytest.raises(EarlyGuestPanicError, match=r"Kernel panic - not syncing: VFS: Unable to mount root fs"):
        launch_ch()
    assert not at_once.expired


def test_no_init_in_a_real_guest_is_a_panic_at_once(guest, tmp_path):
    with pytest.raises(EarlyGuestPanicError, match="Kernel panic - not syncing"):
        launch(
            vmm="qemu", network="none", cmdline="console=ttyS0 quiet rdinit=/none init=/none", serial_log=tmp_path / "serial.log"
        )


def broken_image(directory):
    image = directory / "broken.img"
    image.write_bytes(b"QFI\xfb" + b"\xff" * 1000)
    return image


FAILURES = {
    "executable": MissingRequirementError,
    "root-disk": HostError,
    "second-sidecar-has-no-socket": BootFailedError,
    "second-sidecar-exits": BootFailedError,
    "no-virtiofsd": MissingRequirementError,
    "exec": BootFailedError,
}


@pytest.mark.parametrize("step", FAILURES)
def test_failure_leaves_nothing(
    ch, stand_in_ch, stand_in_virtiofsd, step, tap_name, link_exists, tmp_path, monkeypatch, wait_ended, request
):
    shared = {"a": tmp_path, "b": tmp_path}
    config = {"shared_dirs": shared, "networks": [Tap(tap_name)], "name": "fails"}
    if step == "executable":
        stand_in_ch.does(version_status=1)
        stand_in_ch.path.touch()
    elif step == "root-disk":
        config["root_disk"] = broken_image(tmp_path)
    elif step == "second-sidecar-has-no-socket":
        monkeypatch.setattr(virtiofsd, "SOCKET_TIMEOUT_S", 0.5)
        stand_in_virtiofsd.does(no_socket_for=["fs1.sock"])
    elif step == "second-sidecar-exits":
        # It is told to once the first one is there.
        config["shared_dirs"] = [SharedDir("a", tmp_path), SharedDir("b", tmp_path)]
        stand_in_virtiofsd.does(no_socket_for=["fs1.sock"], says="no such thing\n")
        monkeypatch.setattr(virtiofsd, "SOCKET_TIMEOUT_S", 20)

        def end_the_second():
            while not (found := [r for r in stand_in_virtiofsd.records() if "fs1.sock" in " ".join(r["argv"])]):
                assert threading.current_thread().is_alive()
            os.kill(found[0]["pid"], signal.SIGUSR1)

        thread = threading.Thread(target=end_the_second, daemon=True)
        thread.start()
        request.addfinalizer(thread.join)
    elif step == "no-virtiofsd":
        only = tmp_path / "only"
        only.mkdir()
        for program in ("ip", "qemu-img"):
            (only / program).symlink_to(shutil.which(program))
        (only / "cloud-hypervisor").symlink_to(stand_in_ch.path)
        monkeypatch.setenv("PATH", str(only))
        monkeypatch.setattr(virtiofsd, "PLACES", (str(tmp_path / "none"),))
    elif step == "exec":
        found = ch.driver.binary()
        stand_in_ch.path.write_bytes(b"\x7fELF")
        monkeypatch.setattr(type(ch.driver), "binary", lambda self: found)

    with pytest.raises(FAILURES[step]) as caught:
        ch.driver.boot(ch.config(**config))
    assert caught.value.vm_name == "fails"
    assert not link_exists(tap_name)
    assert stand_in_ch.records() == []
    for record in stand_in_virtiofsd.records():
        assert wait_ended(record["pid"], 2), f"a sidecar is left: {record['argv']}"
    if "sidecar" in step:
        assert "shared dir 'b'" in str(caught.value)
        assert str(tmp_path) in str(caught.value)
    if step == "second-sidecar-exits":
        assert "status 3" in str(caught.value)
        assert "no such thing" in str(caught.value)
    # The name is free again.
    monkeypatch.undo()
    if step not in ("executable", "exec"):
        monkeypatch.setenv("PATH", f"{stand_in_ch.directory}{os.pathsep}{os.environ['PATH']}")
        ch.boot(name="fails")


def test_failed_launch_gives_back_its_subnet_and_tap(launch_ch, stand_in_ch, needs_taps):
    stand_in_ch.does(exits_with=1)
    with pytest.raises(BootFailedError):
        launch_ch(networks=[Tap()])
    (record,) = stand_in_ch.records()
    name = re.search(r"tap=(\w+),", " ".join(record["argv"]))[1]
    assert not os.path.exists(f"/sys/class/net/{name}")


def test_tap_in_use_by_another_process_is_an_error_that_says_so(qemu, tap_name):
    first = qemu.boot(networks=[Tap(tap_name)])
    with pytest.raises(HostError, match=rf"'{tap_name}' cannot be attached to: .*busy; another VM may use it"):
        qemu.boot(name="second", networks=[Tap(tap_name, take_over=False)], serial_log=None)
    assert qemu.driver.state(first).state is VmState.RUNNING


# Python's own: what an interrupt meets between `open()` and `with` is closed by the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupted_wait_leaves_nothing(launch_ch, stand_in_ch, wait_ended, ctrl_c_interrupts):
    """Ctrl-C and pytest-timeout raise in the middle of anything."""
    started = threading.Event()

    def interrupt():
        deadline = Deadline.after(AT_ONCE_S)
        with FileWatch(stand_in_ch.directory) as watch:
            started.set()
            while not stand_in_ch.records() and not deadline.expired:
                watch.wait(deadline)
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    started.wait()
    with pytest.raises(KeyboardInterrupt):
        launch_ch()
    interrupting.join()
    gc.collect()
    (record,) = stand_in_ch.records()
    assert wait_ended(record["pid"], 0)


# Bad input: nothing is started, and so the real Cloud Hypervisor has no part in it.


@pytest.fixture(params=["ch", "qemu"])
def vmm(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def never_started(stand_in_ch):
    yield
    assert stand_in_ch.records() == []


def unreadable(path):
    path.write_bytes(bytes(0x202) + b"HdrS")
    path.chmod(0)
    return path


@pytest.mark.parametrize("key", ["kernel", "initramfs", "root_disk", "seed_iso", "data_disk"])
def test_file_that_is_missing_or_a_directory(vmm, never_started, tmp_path, key):
    with pytest.raises(InvalidConfigError, match=rf"{key} '{tmp_path}/none' does not exist"):
        vmm.boot(**{key: tmp_path / "none"})
    with pytest.raises(InvalidConfigError, match=rf"{key} '{tmp_path}' is a directory, expected a file") as caught:
        vmm.boot(**{key: tmp_path})
    assert caught.value.vm_name == "vm"


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", bytes(10_000), b"MOZ" * 5000], ids=["empty", "script", "zeros", "text"])
def test_kernel_that_is_none(vmm, never_started, tmp_path, content):
    image = tmp_path / "vmlinuz"
    image.write_bytes(content)
    with pytest.raises(InvalidConfigError, match=r"is not a kernel: expected a bzImage, an ELF vmlinux"):
        vmm.boot(kernel=image)


def test_kernel_that_is_unreadable(tmp_path, fake_kernel):
    """As root everything is readable, so this asks as somebody else."""
    script = """
import os, sys
from pytest_chvm import VmConfig, InvalidConfigError
from pytest_chvm.drivers.preflight import preflight
import psutil, pytest_chvm.host.networks.tap
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
try:
    preflight(VmConfig(kernel=sys.argv[1]))
except InvalidConfigError as error:
    print(error)
"""
    import sys

    tmp_path.chmod(0o755)
    fake_kernel.chmod(0)
    for parent in fake_kernel.parents:
        if parent.stat().st_uid == os.geteuid() and parent != parent.parent:
            parent.chmod(parent.stat().st_mode | 0o011)
    said = subprocess.check_output([sys.executable, "-c", script, fake_kernel], text=True)
    assert "cannot be read by you" in said


def test_more_than_the_host_has(vmm, never_started):
    with pytest.raises(InvalidConfigError, match=rf"cpus=1000, and the host has {os.cpu_count()}"):
        vmm.boot(cpus=1000)
    with pytest.raises(InvalidConfigError, match=r"memory_mb=100000000, and the host has \d+"):
        vmm.boot(memory_mb=100_000_000)


def test_shared_dir_that_is_missing_or_a_file(vmm, never_started, stand_in_virtiofsd, tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InvalidConfigError, match=r"shared dir 'a': .*none' does not exist"):
        vmm.boot(shared_dirs={"a": tmp_path / "none"})
    with pytest.raises(InvalidConfigError, match=r"shared dir 'a': .*file' is not a directory"):
        vmm.boot(shared_dirs={"a": file})
    assert stand_in_virtiofsd.records() == []


def test_shared_dir_that_is_no_text(vmm, never_started, stand_in_virtiofsd, tmp_path):
    path = tmp_path / os.fsdecode(b"share-\xff")
    path.mkdir()
    with pytest.raises(InvalidConfigError, match=r"not valid UTF-8, which virtiofsd cannot take; rename it"):
        vmm.boot(shared_dirs={"a": path})
    assert stand_in_virtiofsd.records() == []


def test_log_directory_that_cannot_be_written(vmm, never_started, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(InvalidConfigError, match=rf"the log directory '{small_disk}/logs' cannot be written"):
        vmm.boot(serial_log=small_disk / "logs" / "serial.log")


def test_log_that_is_a_directory_or_below_a_file(vmm, never_started, tmp_path):
    with pytest.raises(InvalidConfigError, match="is a directory, expected a file"):
        vmm.boot(serial_log=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidConfigError, match="cannot be written"):
        vmm.boot(serial_log=tmp_path / "file" / "serial.log")


def test_full_disk_below_the_log(vmm, never_started, small_disk):
    (small_disk / "filler").write_bytes(bytes(1 << 20))
    with pytest.raises(HostError, match="is full") as caught:
        vmm.boot(serial_log=small_disk / "serial.log")
    assert str(small_disk) in str(caught.value)
    assert os.listdir(small_disk) == ["filler"]


def test_full_disk_below_the_cache(small_disk, monkeypatch):
    (small_disk / "filler").write_bytes(bytes(900_000))
    from pytest_chvm import Settings
    from pytest_chvm.guest.initramfs import build_initramfs
    from pytest_chvm.machine.guest_choice import built_in_kernel

    with pytest.raises(HostError, match=r"cannot be written: .*No space left.*free some space.*CHVM_CACHE_DIR"):
        build_initramfs(built_in_kernel(Settings.resolve()), small_disk / "cache", print)
    assert [path.name for path in (small_disk / "cache" / "initramfs").iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memroy_mb": 5}, r"no argument 'memroy_mb'; did you mean memory_mb"),
        ({"xyzzy": 5}, r"no argument 'xyzzy'; there are: name, namespace, kernel"),
        ({"boot_timeout": "soon"}, r"boot_timeout='soon': expected a number of seconds above 0"),
        ({"boot_timeout": -1}, r"expected a number of seconds above 0"),
        ({"vmm": "xen"}, r"vmm='xen': expected one of auto, cloud-hypervisor, qemu"),
        ({"accel": "hvf"}, r"accel='hvf': expected one of auto, kvm, tcg"),
        ({"network": "bridge"}, r"network='bridge': expected one of auto, tap, user, none"),
        ({"boot": "warm"}, r"boot='warm': expected one of auto, cold, clone"),
        ({"ready_marker": "TWO WORDS"}, r"expected one word"),
        ({"cpus": 0}, r"cpus=0, expected a whole number of 1 or more"),
        ({"netns": "no-such-namespace"}, r"'no-such-namespace' does not exist"),
    ],
)
def test_launch_arguments_that_cannot_be(never_started, arguments, message):
    with pytest.raises(InvalidConfigError, match=message):
        launch(**arguments)


def test_errors_are_the_packages(vmm):
    with pytest.raises(VmError):
        vmm.driver.boot(VmConfig())

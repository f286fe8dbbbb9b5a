"""Stop, kill and state: of VMs that behave, that do not, that are gone, and that are not ours."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from pytest_chvm import (
    InvalidConfigError,
    ProcessIdentity,
    StateFailedError,
    StopFailedError,
    Tap,
    VmHandle,
    VmNotFoundError,
    VmState,
    VmStatus,
)
from pytest_chvm.drivers import process as vmm_process
from pytest_chvm.host.keeper import remains
from pytest_chvm.host.processes import identity_of


@pytest.fixture
def settled(request):
    """Wait until a VMM has begun to do what it was told: the stand-in has set its signal handlers by then."""

    def wait(handle):
        if handle.vmm == "cloud-hypervisor" and "stand_in_ch" in request.fixturenames:
            request.getfixturevalue("stand_in_ch").record(handle.process.pid)
        return handle

    return wait


def in_another_process(handle, call, patience_s=10.0):
    """Do something with a handle in a process that knows nothing but its JSON; returns what that printed."""
    script = f"""
        import sys
        from pytest_chvm import *
        from pytest_chvm.drivers import make_driver, process as vmm_process
        vmm_process.STOP_TIMEOUT_S = {patience_s}
        handle = VmHandle.from_json(sys.stdin.read())
        driver = make_driver(handle.vmm)
        try:
            print("returned", {call})
        except VmError as error:
            print(type(error).__name__, error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        input=handle.to_json(),
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    return done.stdout.strip()


def test_boot_returns_at_once_starting(vmm):
    handle = vmm.boot()
    assert handle.state is VmState.STARTING
    assert handle.process.pid > 0
    assert vmm.driver.state(handle) == VmStatus(VmState.RUNNING)


def test_process_is_identified_by_pid_and_start_time(vmm):
    handle = vmm.boot()
    stat = open(f"/proc/{handle.process.pid}/stat", "rb")
    with stat:
        text = stat.read().decode()
    assert handle.process.start_time_ticks == int(re.sub(r"^.*\)", "", text, flags=re.S).split()[22 - 3])


@pytest.mark.parametrize("name", ["a b", "x) R 1 (y", ") 1 2 3", "((", "new\nline"])
def test_start_time_of_a_process_with_a_name_like_the_format(name, tmp_path):
    program = tmp_path / name
    program.symlink_to("/bin/sleep")

    def ticks():
        return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))

    before = ticks()
    with subprocess.Popen([program, "60"]) as process:
        try:
            with open(f"/proc/{process.pid}/stat") as stat:
                assert f"({name[:15]})" in stat.read()
            assert before <= remains.start_time_ticks(process.pid) <= ticks()
        finally:
            process.kill()


def test_zombie_has_no_start_time():
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert remains.start_time_ticks(process.pid) is None
    process.wait()


def test_stop_ends_it_with_sigterm_and_removes_all(vmm, settled, tap_name, wait_ended, link_exists):
    handle = settled(vmm.boot(networks=[Tap(tap_name)]))
    assert link_exists(tap_name)
    vmm.driver.stop(handle)
    assert wait_ended(handle.process.pid, 0)
    assert not link_exists(tap_name)
    assert not handle.run_dir.exists()
    assert vmm.driver.state(handle) == VmStatus(VmState.STOPPED)


def test_kill_ends_it_with_sigkill_and_reaps_it(vmm, freeze, settled, tap_name, link_exists):
    handle = settled(vmm.boot(networks=[Tap(tap_name)]))
    freeze(handle.process.pid)
    assert vmm_process.KILL_TIMEOUT_S == 2
    vmm.driver.kill(handle)
    assert not os.path.exists(f"/proc/{handle.process.pid}")
    assert not link_exists(tap_name)
    assert not handle.run_dir.exists()


def test_vmm_that_ignores_sigterm_is_killed_and_that_is_an_error(
    vmm, freeze, settled, monkeypatch, tap_name, wait_ended, link_exists
):
    assert vmm_process.STOP_TIMEOUT_S == 10
    monkeypatch.setattr(vmm_process, "STOP_TIMEOUT_S", 0.3)
    handle = settled(vmm.boot(networks=[Tap(tap_name)]))
    freeze(handle.process.pid)
    with pytest.raises(StopFailedError, match=r"ignored SIGTERM for 0.3 s and was killed") as caught:
        vmm.driver.stop(handle)
    assert caught.value.vm_name == handle.name
    assert wait_ended(handle.process.pid, 0)
    assert not link_exists(tap_name)
    assert not handle.run_dir.exists()


def test_vmm_that_ignores_sigterm_by_itself(ch, stand_in_ch, settled, monkeypatch):
    monkeypatch.setattr(vmm_process, "STOP_TIMEOUT_S", 0.3)
    stand_in_ch.does(ignores_sigterm=True)
    handle = settled(ch.boot())
    with pytest.raises(StopFailedError, match="was killed"):
        ch.driver.stop(handle)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_vmm_that_is_gone_already_is_no_error(vmm, end, tap_name, wait_ended, link_exists):
    handle = vmm.boot(networks=[Tap(tap_name)])
    os.kill(handle.process.pid, signal.SIGKILL)
    assert wait_ended(handle.process.pid)
    getattr(vmm.driver, end)(handle)
    assert not link_exists(tap_name)
    assert not handle.run_dir.exists()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_ending_it_twice_is_no_error(vmm, end):
    handle = vmm.boot()
    vmm.driver.kill(handle)
    getattr(vmm.driver, end)(handle)


def test_threads_that_end_it_all_return_when_it_has_ended(vmm, settled, tap_name, link_exists):
    handle = settled(vmm.boot(networks=[Tap(tap_name)]))
    together = threading.Barrier(6)

    def end(how):
        together.wait()
        how(handle)
        return os.path.exists(f"/proc/{handle.process.pid}"), link_exists(tap_name), handle.run_dir.exists()

    with ThreadPoolExecutor(6) as executor:
        assert list(executor.map(end, [vmm.driver.kill, vmm.driver.stop] * 3)) == [(False, False, False)] * 6


@pytest.mark.parametrize("ignores", [False, True])
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_sidecars_end_with_it(ch, stand_in_ch, stand_in_virtiofsd, settled, tmp_path, wait_ended, end, ignores):
    assert vmm_process.SIDECAR_TIMEOUT_S == 1
    stand_in_virtiofsd.does(ignores_sigterm=ignores)
    handle = settled(ch.boot(shared_dirs={"a": tmp_path, "b": tmp_path}))
    assert len(handle.sidecars) == 2
    getattr(ch.driver, end)(handle)
    assert all(wait_ended(sidecar.pid, 0) for sidecar in handle.sidecars)
    assert not handle.run_dir.exists()


def test_the_rest_is_removed_also_when_the_vmm_part_failed(
    ch, stand_in_ch, stand_in_virtiofsd, stranger, settled, tmp_path, tap_name, wait_ended, link_exists
):
    handle = settled(ch.boot(shared_dirs={"a": tmp_path}, networks=[Tap(tap_name)]))
    with pytest.raises(StateFailedError):
        ch.driver.stop(replace(handle, process=identity_of(stranger.pid)))
    assert all(wait_ended(sidecar.pid, 0) for sidecar in handle.sidecars)
    assert not link_exists(tap_name)
    assert not handle.run_dir.exists()
    assert stranger.poll() is None
    ch.driver.kill(handle)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_handle_works_in_another_process(vmm, settled, end, tap_name, wait_ended, link_exists):
    handle = settled(vmm.boot(networks=[Tap(tap_name)]))
    # In the lab a process starts for so long that the guest may be ready by then.
    assert re.search(r"VmStatus\(state=<VmState\.(RUNNING|READY)", in_another_process(handle, "driver.state(handle)"))
    assert wait_ended(handle.process.pid, 0) is False
    assert in_another_process(handle, f"driver.{end}(handle)") == "returned None"
    assert wait_ended(handle.process.pid, 0)
    assert not link_exists(tap_name)
    assert not handle.run_dir.exists()
    assert "STOPPED" in in_another_process(handle, "driver.state(handle)")


def test_sidecars_of_a_restored_handle_end(ch, stand_in_ch, stand_in_virtiofsd, settled, tmp_path, wait_ended):
    handle = settled(ch.boot(shared_dirs={"a": tmp_path}))
    assert in_another_process(handle, "driver.stop(handle)") == "returned None"
    assert all(wait_ended(sidecar.pid, 0) for sidecar in handle.sidecars)


def test_restored_vmm_that_ignores_sigterm_is_killed_without_an_error(vmm, freeze, settled, wait_ended):
    handle = settled(vmm.boot())
    freeze(handle.process.pid)
    assert in_another_process(handle, "driver.stop(handle)", patience_s=0.3) == "returned None"
    assert wait_ended(handle.process.pid, 0)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_recycled_pid_is_never_signalled(vmm, settled, end, tap_name, link_exists):
    """The pid is another VM's of the same VMM: the command line alone would not tell."""
    handle = settled(vmm.boot(networks=[Tap(tap_name)]))
    neighbour = settled(vmm.boot(name="neighbour", serial_log=None))
    mistaken = replace(
        handle, process=ProcessIdentity(neighbour.process.pid, neighbour.process.start_time_ticks - 1), taps=(tap_name,)
    )
    os.kill(handle.process.pid, signal.SIGKILL)
    said = in_another_process(mistaken, f"driver.{end}(handle)")
    assert said.startswith(f"StateFailedError pid {neighbour.process.pid} is another process now")
    assert "not signalled" in said
    assert vmm.driver.state(neighbour).state in (VmState.RUNNING, VmState.READY)
    # What the VM left behind is removed all the same.
    assert not link_exists(tap_name)
    assert not handle.run_dir.exists()
    assert "STOPPED" in in_another_process(mistaken, "driver.state(handle)")


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_process_that_is_no_vmm_is_never_signalled(vmm, stranger, end):
    handle = vmm.boot()
    mistaken = replace(handle, process=identity_of(stranger.pid))
    with pytest.raises(StateFailedError, match=r"runs 'sleep 600', expected .*; it was not signalled") as caught:
        getattr(vmm.driver, end)(mistaken)
    assert caught.value.vm_name == handle.name
    assert stranger.poll() is None
    assert vmm.driver.state(mistaken) == VmStatus(VmState.STOPPED)


def test_handle_without_a_start_time_is_checked_by_its_command_line_alone(vmm, settled, stranger, wait_ended):
    handle = settled(vmm.boot())
    with pytest.raises(StateFailedError, match="not signalled"):
        vmm.driver.stop(replace(handle, process=ProcessIdentity(stranger.pid)))
    assert stranger.poll() is None
    nameless = replace(handle, process=ProcessIdentity(handle.process.pid))
    assert vmm.driver.state(nameless).state is VmState.RUNNING
    vmm.driver.kill(nameless)
    assert wait_ended(handle.process.pid, 0)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_handle_with_no_process(vmm, tmp_path, end):
    handle = VmHandle("never", "default", vmm.driver.vmm, VmState.STARTING, None, tmp_path / "serial.log", "id")
    with pytest.raises(VmNotFoundError, match="has no process: it was never started") as caught:
        getattr(vmm.driver, end)(handle)
    assert caught.value.vm_name == "never"
    assert vmm.driver.state(handle) == VmStatus(VmState.STOPPED)


def test_state_of_a_zombie_is_stopped(ch, stand_in_ch):
    handle = ch.boot()
    zombie = subprocess.Popen(["true"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    assert ch.driver.state(replace(handle, process=ProcessIdentity(zombie.pid, 1))) == VmStatus(VmState.STOPPED)
    zombie.wait()


def test_state_is_ready_with_the_ip_once_the_marker_was_there(ch, stand_in_ch):
    stand_in_ch.does(serial="Linux\r\nCHVM_READY 192.0.2.7\r\n")
    handle = ch.boot()
    stand_in_ch.record(handle.process.pid)
    assert ch.driver.state(handle) == VmStatus(VmState.READY, "192.0.2.7")
    assert in_another_process(handle, "driver.state(handle)") == "returned VmStatus(state=<VmState.READY: 'ready'>, ip='192.0.2.7')"


def test_asking_for_the_state_changes_nothing(ch, stand_in_ch):
    stand_in_ch.does(serial="CHVM_READY 192.0.2.7\n")
    handle = ch.boot()
    stand_in_ch.record(handle.process.pid)

    def everything():
        files = [*handle.run_dir.rglob("*"), handle.serial_log, handle.vmm_log]
        return {(path, path.stat().st_mtime_ns, path.stat().st_size) for path in files}

    before = everything()
    for _time in range(3):
        ch.driver.state(handle)
    in_another_process(handle, "driver.state(handle)")
    assert everything() == before
    assert stand_in_ch.requests == []
    assert len(stand_in_ch.records()) == 1


@pytest.mark.parametrize("missing", [False, True])
def test_old_marker_in_the_serial_log_never_counts(vmm, tmp_path, missing):
    log = tmp_path / "serial.log"
    if not missing:
        log.write_text("CHVM_READY 192.0.2.99\n")
        log.with_suffix(".vmm.log").write_text("old")
    handle = vmm.boot(serial_log=log)
    assert vmm.driver.state(handle) == VmStatus(VmState.RUNNING)
    assert "192.0.2.99" not in log.read_text()
    assert "old" not in handle.vmm_log.read_text()


def test_second_vm_of_a_name_and_namespace_is_refused(vmm):
    handle = vmm.boot(name="web")
    with pytest.raises(InvalidConfigError, match=r"'web' in namespace 'default' is running already: give this one another name"):
        vmm.boot(name="web")
    # The refusal has done nothing to the first one.
    assert vmm.driver.state(handle).state is VmState.RUNNING
    vmm.boot(name="web", namespace="other", serial_log=None)
    vmm.boot(name="web2", serial_log=None)
    vmm.driver.stop(handle)
    vmm.boot(name="web", serial_log=None)


def test_vm_that_has_died_holds_no_name(vmm, wait_ended):
    handle = vmm.boot(name="web")
    os.kill(handle.process.pid, signal.SIGKILL)
    assert wait_ended(handle.process.pid)
    again = vmm.boot(name="web", serial_log=None)
    # Cleaning up after the dead one does not free the name of the living one.
    vmm.driver.stop(handle)
    with pytest.raises(InvalidConfigError, match="running already"):
        vmm.boot(name="web", serial_log=None)
    vmm.driver.stop(again)


def test_of_two_threads_that_want_a_name_one_gets_it(ch):
    barrier, outcomes = threading.Barrier(4), []

    def boot():
        barrier.wait()
        try:
            outcomes.append(ch.boot(name="web", serial_log=None))
        except InvalidConfigError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=boot) for _number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(isinstance(outcome, VmHandle) for outcome in outcomes) == [False, False, False, True]

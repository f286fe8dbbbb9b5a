"""A Host owns what one run has of the host; there may be several in a process, and a child that is forked begins anew."""

import os
import traceback

import pytest

from pytest_chvm import HostError, InvalidConfigError, launch
from pytest_chvm.host.host import Host
from pytest_chvm.host.keeper.remains import start_time_ticks
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.locks import HeldLock
from pytest_chvm.host.runs import Run


@pytest.fixture
def hosts():
    """Two hosts of this process's."""
    both = [Host(Run("first")), Host(Run("second"))]
    yield both
    for host in both:
        host.close()


def sleeper(host):
    lease = Lease(host)
    return lease, lease.keeper.spawn(["sleep", "600"], lease.directory / "log", lease.directory)


def is_there(process):
    return start_time_ticks(process.pid) == process.start_time_ticks


def test_the_end_of_one_host_leaves_another_s_leases_locks_and_processes_alone(hosts):
    first, second = hosts
    ended, its_process = sleeper(first)
    its_lock = HeldLock(f"test-{os.getpid()}-first.lock", ended)
    lease, process = sleeper(second)
    lock = HeldLock(f"test-{os.getpid()}-second.lock", lease)
    # The same number, in directories of their own.
    assert ended.directory.name == lease.directory.name
    assert ended.keeper is not lease.keeper

    assert first.close() == []
    assert (is_there(its_process), ended.directory.exists(), first.locks) == (False, False, {})
    assert (is_there(process), lease.directory.exists(), second.locks) == (True, True, {lock: lease.directory})
    with pytest.raises(TimeoutError):
        HeldLock(lock.name, Lease(second), timeout_s=0)
    HeldLock(its_lock.name, lease, timeout_s=0).release()

    assert second.close() == []
    assert not is_there(process)


def test_a_run_directory_that_cannot_be_written_is_the_host_s_fault(hosts):
    host, _other = hosts
    lease = Lease(host)
    (lease.directory / "lease.new").mkdir()
    with pytest.raises(HostError, match="cannot be written"):
        lease.add_path(lease.directory / "path")
    lease.directory.with_name("2").mkdir()
    with pytest.raises(HostError, match="cannot be written"):
        Lease(host)
    assert host.close() == []


def test_vms_of_two_hosts_may_have_one_name_are_counted_apart_and_end_apart(hosts, caplog):
    first, second = hosts
    with launch(name="same", vmm="qemu", networks=[], host=first) as ended:
        vm = launch(name="same", vmm="qemu", networks=[], host=second)
        with pytest.raises(InvalidConfigError, match="is running already"):
            launch(name="same", vmm="qemu", networks=[], host=second)
        assert "is booted, not cloned" not in caplog.text
        assert ended.check_output("echo first") == "first\n"
    assert first.close() == []
    assert vm.check_output("echo second") == "second\n"
    vm.close()
    counts = [host.started.total()["VM"] for host in hosts]
    # A template that had to be made first is one more.
    assert counts in ([1, 1], [2, 1])
    first.end_run()
    assert (first.started.total()["VM"], second.started.total()["VM"]) == (0, 1)


def test_a_forked_child_has_a_keeper_of_its_own_and_ends_none_of_its_parent_s(hosts):
    host = hosts[0]
    lease, process = sleeper(host)
    pid = os.fork()
    if pid == 0:
        try:
            assert lease.release() == []
            its_lease, its_process = sleeper(host)
            assert its_lease.keeper is not lease.keeper
            assert host.close() == []
            assert not is_there(its_process)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert is_there(process)
    assert lease.keeper is host.keeper()

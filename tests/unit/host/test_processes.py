import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from pytest_chvm.errors import StateFailedError
from pytest_chvm.host.host import default_host
from pytest_chvm.host.keeper.records import read_pairs
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.processes import end_process, identity_of
from pytest_chvm.model import ProcessIdentity

# Fields 48 and 49 of stat, where the arguments are (proc(5)): what /proc/PID/cmdline shows of a process whose memory is gone.
NO_COMMAND_LINE = """
import ctypes, signal
fields = open("/proc/self/stat").read().rsplit(")", 1)[1].split()
start, end = int(fields[45]), int(fields[46])
ctypes.memset(start, 0, end - start)
print("ready", flush=True)
signal.pause()
"""


@pytest.fixture
def nameless():
    with subprocess.Popen([sys.executable, "-c", NO_COMMAND_LINE], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


def test_a_process_without_a_command_line_is_known_by_its_start_time(nameless):
    end_process(identity_of(nameless.pid), ("virtiofsd",), term_timeout_s=5, kill_timeout_s=5)
    assert nameless.wait(0) < 0


def test_a_process_with_neither_command_line_nor_start_time_is_not_signalled(nameless):
    with pytest.raises(StateFailedError):
        end_process(ProcessIdentity(nameless.pid), ("virtiofsd",), term_timeout_s=5, kill_timeout_s=5)
    assert nameless.poll() is None


# Its first thread ends, and another goes on until a FIFO does.
ENDING = """
import ctypes, os, platform, sys, threading
def last():
    while b") Z" not in open("/proc/self/stat", "rb").read():
        pass
    print("zombie", flush=True)
    open(sys.argv[1]).read()
    os._exit(0)
threading.Thread(target=last).start()
ctypes.CDLL(None).syscall(60 if platform.machine() == "x86_64" else 93, 0)
"""


@pytest.fixture
def lease():
    lease = Lease(default_host())
    yield lease
    assert lease.release(search=True) == []


def parent(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("ended_before", [True, False], ids=["that ended by itself", "that is killed"])
def test_of_a_process_of_the_keeper_s_not_even_a_zombie_is_left(lease, freeze, wait_ended, ended_before):
    process = lease.keeper.spawn(["sleep", "600"], lease.directory / "log", lease.directory)
    its_parent = parent(process.pid)
    assert its_parent in read_pairs(lease.keeper.directory / "lock")
    # A keeper that has other things to do.
    freeze(its_parent)
    with ThreadPoolExecutor(1) as executor:
        try:
            if ended_before:
                os.kill(process.pid, signal.SIGKILL)
                assert wait_ended(process.pid)
            ending = executor.submit(end_process, process, ("sleep",), term_timeout_s=0, kill_timeout_s=5)
            assert wait_ended(process.pid)
            assert os.path.exists(f"/proc/{process.pid}")
            # Whether it waits cannot be seen; that it did can.
            with pytest.raises(TimeoutError):
                ending.result(0.3)
        finally:
            os.kill(its_parent, signal.SIGCONT)
        ending.result(10)
    assert not os.path.exists(f"/proc/{process.pid}")


def test_a_process_that_is_on_its_way_out_is_waited_for(tmp_path, wait_ended):
    held = tmp_path / "held"
    os.mkfifo(held)
    with (
        subprocess.Popen([sys.executable, "-c", ENDING, held], stdout=subprocess.PIPE) as process,
        held.open("w"),
        ThreadPoolExecutor(1) as executor,
    ):
        assert process.stdout.readline() == b"zombie\n"
        ending = executor.submit(end_process, identity_of(process.pid), ("python",), term_timeout_s=0, kill_timeout_s=5)
        with pytest.raises(TimeoutError):
            ending.result(0.3)
        process.kill()
        ending.result(10)
        assert wait_ended(process.pid, 0)

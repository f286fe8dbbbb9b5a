import subprocess
import sys

import pytest

from pytest_chvm.errors import StateFailedError
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

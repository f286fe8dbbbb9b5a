"""Descriptors of processes."""

import os
import subprocess

import pytest

from pytest_chvm.base.pidfds import open_pidfd


def test_a_pid_that_is_only_the_number_of_a_session_is_no_process():
    with subprocess.Popen(["sh", "-c", "sleep 600 >/dev/null & echo $!"], stdout=subprocess.PIPE, start_new_session=True) as leader:
        child = int(leader.stdout.readline())
    try:
        # Older kernels say EINVAL, and ESRCH only of other pids.
        with pytest.raises(ProcessLookupError):
            open_pidfd(leader.pid)
    finally:
        os.kill(child, 9)
    os.close(open_pidfd(os.getpid()))

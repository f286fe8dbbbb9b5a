"""Deadlines pass on a clock that goes on only while the process can."""

import os
import select
import signal
import subprocess
import sys

import pytest

from pytest_chvm.base import deadline
from pytest_chvm.base.deadline import Deadline, wait_readable
from pytest_chvm.base.untouched import monotonic_s
from pytest_chvm.host.keeper import remains

# Waits for its input within 1.5 s, by the one kind of wait or the other.
WAITS = """
import os, sys
from pytest_chvm.base.deadline import Deadline, wait_readable
from pytest_chvm.host.keeper import remains
if sys.argv[1] == "deadline":
    wait = lambda fd: bool(wait_readable([fd], Deadline.after(1.5)))
else:
    wait = lambda fd: not remains.wait_for_ends([fd], 1.5)
print("waits", flush=True)
print(wait(0))
"""
STOPPED_S = 3.0


def state(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("kind", ["deadline", "ends"])
def test_what_comes_after_a_stop_that_was_longer_than_the_wait_is_not_missed(kind, freeze):
    with subprocess.Popen([sys.executable, "-c", WAITS, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"waits\n"
        sleeps = Deadline.after(30)
        while state(process.pid) != "S":
            assert not sleeps.expired
        freeze(process.pid)
        select.select([], [], [], STOPPED_S)
        os.kill(process.pid, signal.SIGCONT)
        # Neither at once nor late.
        select.select([], [], [], 0.3)
        process.stdin.write(b"x")
        process.stdin.flush()
        assert process.stdout.readline() == b"True\n"


def test_a_stop_counts_once_however_many_waits_it_was_in():
    clock = deadline._Clock()
    before = clock.now_s()
    clock.woke(monotonic_s() - 600)
    clock.woke(monotonic_s() - 600)
    assert clock.now_s() - before == pytest.approx(-600, abs=30)


@pytest.mark.parametrize("timeout_s", [float("inf"), 1e7, 0.0])
def test_any_time_will_do(timeout_s):
    readable, writable = os.pipe()
    try:
        assert wait_readable([readable], Deadline.after(0.01)) == set()
        os.write(writable, b"x")
        assert wait_readable([readable], Deadline.after(timeout_s)) == {readable}
        assert remains.wait_for_ends([readable], timeout_s) == set()
    finally:
        os.close(readable)
        os.close(writable)

"""Runs that are stopped (Ctrl-Z, SIGSTOP) while others of the machine go on."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from pytest_chvm.host.remains import is_stopped
from tests.leaks import Sandbox

TAKES = """
import sys
from pytest_chvm.host.budget import Budget, take_share
from pytest_chvm.host.leases import Lease

lease = Lease()
share = take_share(Budget(512, 4), 512, 1, lease, sys.argv[1], lambda said: print(said, flush=True))
print("has it", flush=True)
input()
share.release()
assert lease.release() == []
"""


class Taker:
    """A process that takes the whole budget, until `end`."""

    def __init__(self, sandbox: Sandbox, name: str) -> None:
        self.process = subprocess.Popen(
            sandbox.command(sys.executable, "-c", TAKES, name), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        while not is_stopped(self.process.pid):
            assert self.process.poll() is None

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@pytest.fixture
def taker(sandbox: Sandbox) -> Iterator[Callable[[str], Taker]]:
    started: list[Taker] = []

    def start(name: str) -> Taker:
        started.append(Taker(sandbox, name))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


def test_a_stopped_run_that_waits_is_passed_over_and_said_and_has_its_turn_when_it_goes_on(
    taker: Callable[[str], Taker], sandbox: Sandbox
) -> None:
    holder = taker("holder")
    assert holder.says() == "has it"
    first = taker("first")
    # It says what it waits for: by then it has its ticket.
    assert first.says().startswith("VM 'first' waits for 512 MiB")
    first.stop()
    second = taker("second")
    assert f"; stopped, as by Ctrl-Z, and not waited for where they wait: {first.process.pid} (go on with" in second.says()
    holder.end()
    assert second.says() == "has it"
    first.process.send_signal(signal.SIGCONT)
    second.end()
    assert first.says() == "has it"
    first.end()
    assert [one.process.wait(30) for one in (holder, first, second)] == [0, 0, 0]
    assert not sandbox.left_behind()


TAKES_OFTEN = """
import os, sys
from pytest_chvm.host.budget import Budget, take_share
from pytest_chvm.host.leases import Lease

def note(what):
    os.write(log, what)

log = os.open("/run/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
lease = Lease()
for _ in range(12):
    share = take_share(Budget(512, 4, max_vms=2), 256, 1, lease, "vm", print)
    note(b"+")
    note(b"-")
    share.release()
assert lease.release() == []
"""


def test_whoever_is_stopped_when_the_budget_is_never_exceeded(sandbox: Sandbox) -> None:
    processes = [subprocess.Popen(sandbox.command(sys.executable, "-c", TAKES_OFTEN)) for _ in range(5)]
    chosen = random.Random(0)
    try:
        while running := [process for process in processes if process.poll() is None]:
            victim = chosen.choice(running)
            victim.send_signal(signal.SIGSTOP)
            with suppress(subprocess.TimeoutExpired):
                chosen.choice(running).wait(chosen.uniform(0, 0.05))
            victim.send_signal(signal.SIGCONT)
        assert [process.returncode for process in processes] == [0] * 5
    finally:
        for process in processes:
            process.kill()
            process.wait()
    held = 0
    for what in sandbox.path("/run/log").read_text():
        held += 1 if what == "+" else -1
        assert 0 <= held <= 2
    sandbox.run("rm", "/run/log")
    assert not sandbox.left_behind()

"""Runs that are stopped (Ctrl-Z, SIGSTOP) while others of the machine go on."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_chvm.base import cache, lockfiles
from pytest_chvm.base.lockfiles import is_stopped
from pytest_chvm.errors import HostError
from tests.leaks import Sandbox

TAKES = """
import sys
from pytest_chvm.host.budget import Budget, take_share
from pytest_chvm.host.host import default_host
from pytest_chvm.host.leases import Lease

lease = Lease(default_host())
share = take_share(Budget(512, 4), 512, 1, lease, sys.argv[1], lambda said: print(said, flush=True))
print("has it", flush=True)
input()
share.release()
assert lease.release() == []
"""


class Taker:
    """A process that takes the whole budget, until `end`."""

    def __init__(self, sandbox: Sandbox, name: str, first: str) -> None:
        self.process = subprocess.Popen(
            sandbox.command(sys.executable, "-c", first + TAKES, name), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
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
def taker(sandbox: Sandbox) -> Iterator[Callable[..., Taker]]:
    started: list[Taker] = []

    def start(name: str, first: str = "") -> Taker:
        started.append(Taker(sandbox, name, first))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


def test_a_stopped_run_that_waits_is_passed_over_and_said_and_has_its_turn_when_it_goes_on(
    taker: Callable[..., Taker], sandbox: Sandbox
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


STOPS_WHILE_IT_TAKES = """
import os, signal
from pytest_chvm.host import budget

really_hold = budget._hold

def hold(kind, *arguments):
    if kind == "share":
        budget._hold = really_hold
        os.kill(os.getpid(), signal.SIGSTOP)
    return really_hold(kind, *arguments)

budget._hold = hold
"""


def test_a_run_that_is_stopped_while_it_takes_keeps_nobody_waiting_and_takes_nothing_that_was_taken_meanwhile(
    taker: Callable[..., Taker], sandbox: Sandbox
) -> None:
    first = taker("first", STOPS_WHILE_IT_TAKES)
    while not is_stopped(first.process.pid):
        assert first.process.poll() is None
    second = taker("second")
    assert second.says() == "has it"
    first.process.send_signal(signal.SIGCONT)
    assert first.says().startswith("VM 'first' waits for 512 MiB and 1 processor(s) to boot with: 1 VMs have 512 of 512 MiB")
    second.end()
    assert first.says() == "has it"
    first.end()
    assert [one.process.wait(30) for one in (first, second)] == [0, 0]
    assert not sandbox.left_behind()


BUILDS = """
import sys
from pathlib import Path
from pytest_chvm.base import cache

cache.built_once(Path(sys.argv[1]), lambda directory: (print("builds", flush=True), input()))
"""


def test_who_waits_for_what_a_stopped_run_builds_is_told_and_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockfiles, "PATIENCE_BEFORE_MESSAGE_S", 0.1)
    monkeypatch.setattr(lockfiles, "STOPPED_TIMEOUT_S", 0.5)
    said: list[str] = []
    command = [sys.executable, "-c", BUILDS, tmp_path / "thing"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "builds\n"
        builder.send_signal(signal.SIGSTOP)
        has_it = rf"pid {builder.pid}, which is stopped \(go on with 'kill -CONT {builder.pid}', or end it\), has it"
        with pytest.raises(HostError, match=has_it):
            cache.built_once(tmp_path / "thing", lambda directory: None, progress=said.append)
        assert [text for text in said if str(builder.pid) in text] == said != []
        builder.send_signal(signal.SIGCONT)
        builder.communicate("\n")
    assert builder.returncode == 0
    assert (tmp_path / "thing").is_dir()

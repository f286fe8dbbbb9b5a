"""The leak detector detects leaks: without that, the tests that find none say nothing."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.leaks import Sandbox, snapshot


@pytest.mark.parametrize(
    ("script", "seen"),
    [
        ("ip link add leak0 type bridge", "link leak0"),
        ("ip tuntap add dev leak1 mode tap", "link leak1"),
        ("ip netns add leak2", "file /run/netns/leak2"),
        ("mkdir /run/leak3 && mount -t tmpfs leak /run/leak3", "mount /run/leak3"),
        ("mkdir -p /run/pytest-chvm/leak4/1", "file /run/pytest-chvm/leak4/1"),
        ("mkdir -p /run/lock/pytest-chvm && touch /run/lock/pytest-chvm/leak5.lock", "file /run/lock/pytest-chvm/leak5.lock"),
        ("touch /dev/shm/leak6", "file /dev/shm/leak6"),
    ],
)
def test_a_deliberate_leak_is_seen(sandbox: Sandbox, script: str, seen: str) -> None:
    assert not sandbox.left_behind()
    sandbox.run("sh", "-c", script)
    assert seen in sandbox.left_behind().things


def test_a_process_that_stays_is_seen_whatever_its_name_and_parent(sandbox: Sandbox) -> None:
    sandbox.run("sh", "-c", "setsid sleep 1000 </dev/null >/dev/null 2>&1 &")
    left = sandbox.left_behind(timeout_s=0.1)
    (pid,) = left.pids
    assert f"process {pid} sleep 1000" in left.things


def test_a_process_that_is_about_to_end_is_waited_for(sandbox: Sandbox) -> None:
    sandbox.run("sh", "-c", "touch /run/left; setsid sh -c 'sleep 0.3; rm /run/left' </dev/null >/dev/null 2>&1 &")
    assert not sandbox.left_behind(timeout_s=10)


def test_what_happens_beside_the_sandbox_is_not_seen(sandbox: Sandbox) -> None:
    with subprocess.Popen(["sleep", "1000"]) as beside:
        try:
            assert not sandbox.left_behind()
        finally:
            beside.kill()


def test_on_the_host_as_a_whole_our_programs_are_seen_by_their_command_line() -> None:
    before = snapshot(os.getpid())
    with subprocess.Popen(["sh", "-c", "read line", "virtiofsd"], stdin=subprocess.PIPE) as leak:
        seen = (snapshot(os.getpid()) - before).things
        leak.communicate()
    assert f"process {leak.pid} sh -c read line virtiofsd" in seen

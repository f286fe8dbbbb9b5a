"""`chvm ps` and `chvm reap`: what runs, and the removal of what killed runs left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.leaks import Sandbox
from tests.runs import StartPytest

CHVM = (sys.executable, "-m", "pytest_chvm.cli")
# The directory that a sandbox has for itself.
PLACE = "/run/pytest-chvm"
LONGEST_COMMAND_S = 120
TWO_VMS = """
    import os, threading

    def test_two(chvm_vm):
        ready = chvm_vm(name="ready", memory_mb=128, boot="cold")
        ready.run("true # done")
        booting = chvm_vm(name="booting", networks=[], cmdline="console=ttyS0", wait=False, boot="cold")
        with open(os.environ["NEWS"], "w") as news:
            print(ready.ip, ready.pid, ready.serial_log, booting.pid, file=news)
        threading.Event().wait()
"""


def chvm(sandbox: Sandbox, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in the sandbox."""
    command = sandbox.command(*CHVM, *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_COMMAND_S, check=False)


def listed_vms(sandbox: Sandbox) -> list[dict[str, Any]]:
    """Return what `chvm ps --json` says of the sandbox's own: the run directories below /tmp are those of the whole machine."""
    return [vm for vm in json.loads(chvm(sandbox, "ps", "--json").stdout) if vm["directory"].startswith(f"{PLACE}/")]


def ours(output: str) -> list[str]:
    """Return the lines of an output that are about the sandbox's own."""
    return [line for line in output.splitlines() if f"{PLACE}/" in line]


def lasting(sandbox: Sandbox) -> set[str]:
    """Return what there is of living runs, but for the locks, which come and go."""
    return {thing for thing in sandbox.left_behind(timeout_s=0).things if "/lock/" not in thing}


def test_ps_lists_vms_with_what_one_needs_to_find_them(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    assert listed_vms(sandbox) == []
    assert not sandbox.left_behind()
    pytester.makepyfile(test_ps=TWO_VMS)
    started = time.clock_gettime(time.CLOCK_BOOTTIME)
    run = start_pytest("-n", "1")
    ip, pid, console, booting_pid = run.news().split()
    listed = listed_vms(sandbox)
    assert [(vm["name"], vm["state"], vm["pid"]) for vm in listed] == [
        ("ready", "ready", int(pid)),
        ("booting", "booting", int(booting_pid)),
    ]
    ready = listed[0]
    assert ready["test"] == "test_ps.py::test_two"
    assert {key: ready[key] for key in ("worker", "ip", "console", "memory_mb", "cpus", "vmm")} == {
        "worker": "gw0",
        "ip": ip,
        "console": console,
        "memory_mb": 128,
        "cpus": 1,
        "vmm": "qemu",
    }
    assert 0 < ready["age_s"] < time.clock_gettime(time.CLOCK_BOOTTIME) - started
    assert 0 < ready["ready_after_s"] < ready["age_s"]
    assert ready["last_command"] == "true # done"
    heads, *rows = chvm(sandbox, "ps").stdout.splitlines()
    first = next(row for row in rows if console in row)
    assert heads.split() == ["VM", "STATE", "TEST", "WORKER", "AGE", "MIB", "IP", "VMM", "PID", "CONSOLE"]
    assert first.split()[:4] == ["ready", "ready", "test_ps.py::test_two", "gw0"]
    assert first.split()[-2:] == [pid, console]
    run.signal(signal.SIGTERM)
    run.wait()


def test_reap_leaves_living_runs_alone_and_removes_what_killed_ones_left(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    pytester.makepyfile(test_ps=TWO_VMS)
    killed = start_pytest("--chvm-network=tap")
    killed.news()
    killed.kill_with_keepers()
    assert not sandbox.left_behind().pids
    listed = listed_vms(sandbox)
    assert [vm["state"] for vm in listed] == ["abandoned", "abandoned"]
    # Whoever starts now cleans up itself, unless there is something to look at first.
    would = json.loads(chvm(sandbox, "reap", "--dry-run", "--json").stdout)
    directory = listed[0]["directory"].rpartition("/")[0]
    assert [path for path in would["removed"] if path.startswith(PLACE)] == [directory]
    assert [vm["state"] for vm in listed_vms(sandbox)] == ["abandoned", "abandoned"]
    done = chvm(sandbox, "reap")
    assert done.returncode == 0
    assert ours(done.stdout) == [f"removed {directory}"]
    assert not sandbox.left_behind()

    living = start_pytest()
    living.news()
    before = lasting(sandbox)
    assert ours(chvm(sandbox, "reap").stdout) == []
    assert lasting(sandbox) >= before
    living.signal(signal.SIGTERM)
    living.wait()


def test_records_that_are_none_are_reported_survived_and_cannot_reach_the_terminal(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    hostile = json.dumps({"vm": {"name": "\x1b[31mred\n", "test": "\u202e\x9b", "pid": "1", "memory_mb": -5, "ip": ["x"]}})
    sandbox.run(
        "sh",
        "-c",
        r"""
        set -e
        umask 077
        mkdir /run/pytest-chvm && cd /run/pytest-chvm
        mkdir -p truncated list foreign/1 hostile/1 "$(printf 'odd\033name')"
        printf '{"boot_id": "a", "pi' >truncated/owner.json
        printf '[1, 2]' >list/owner.json
        printf x >"$(printf 'odd\033name')/owner.json"
        printf x >foreign/1/serial.log
        touch file
        printf '{"boot_id": "of another boot", "pid": 1, "start_time_ticks": 1, "run": "", "worker": "main"}' >hostile/owner.json
        printf %s "$0" >hostile/1/lease.json
        """,
        hostile,
    )
    listed = chvm(sandbox, "ps")
    assert listed.returncode == 0
    assert "\x1b" not in listed.stdout + listed.stderr
    assert not {"\x9b", "\u202e"} & set(listed.stdout)
    (row,) = (row for row in listed.stdout.splitlines() if row.startswith("red"))
    assert row.split()[:2] == ["red\ufffd", "abandoned"]
    reaped = chvm(sandbox, "reap")
    assert reaped.returncode == 1
    assert ours(reaped.stdout) == ["removed /run/pytest-chvm/hostile"]
    assert "\x1b" not in reaped.stderr
    for name in ("truncated", "list", "file"):
        assert f"chvm: /run/pytest-chvm/{name} is not understood (it " in reaped.stderr
    pytester.makepyfile("def test_vm(chvm_vm): chvm_vm(wait=False, networks=[])")
    run = start_pytest()
    assert run.wait() == 0, run.output
    left = {thing for thing in sandbox.left_behind().things if thing.count("/") == 3}
    assert {thing.rpartition("/")[2] for thing in left} == {"truncated", "list", "foreign", "file", "odd\x1bname"}

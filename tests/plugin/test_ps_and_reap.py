"""`chvm ps` and `chvm reap`: what runs, and the removal of what killed runs left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from tests.leaks import Sandbox
from tests.runs import StartPytest

CHVM = (sys.executable, "-m", "pytest_chvm.cli")
TWO_VMS = """
    import os, threading

    def test_two(chvm_vm):
        ready = chvm_vm(name="ready", memory_mb=128, boot="cold")
        booting = chvm_vm(name="booting", networks=[], cmdline="console=ttyS0", wait=False, boot="cold")
        with open(os.environ["NEWS"], "w") as news:
            print(ready.ip, ready.pid, ready.serial_log, booting.pid, file=news)
        threading.Event().wait()
"""


def chvm(sandbox: Sandbox, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in the sandbox."""
    return subprocess.run(sandbox.command(*CHVM, *arguments), capture_output=True, text=True, timeout=30, check=False)


def test_ps_lists_vms_with_what_one_needs_to_find_them(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    assert chvm(sandbox, "ps").stdout == "no VMs\n"
    assert json.loads(chvm(sandbox, "ps", "--json").stdout) == []
    assert not sandbox.left_behind()
    pytester.makepyfile(test_ps=TWO_VMS)
    run = start_pytest("-n", "1")
    ip, pid, console, booting_pid = run.news().split()
    listed = json.loads(chvm(sandbox, "ps", "--json").stdout)
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
    assert 0 < ready["age_s"] < 120
    heads, first, _second = chvm(sandbox, "ps").stdout.splitlines()
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
    keepers = [line.split()[1] for line in sandbox.left_behind(timeout_s=0).things if "keeper.py" in line]
    sandbox.run("kill", "-KILL", str(killed.pid), *keepers)
    killed.wait()
    assert not sandbox.left_behind().pids
    listed = json.loads(chvm(sandbox, "ps", "--json").stdout)
    assert [vm["state"] for vm in listed] == ["abandoned", "abandoned"]
    # Whoever starts now cleans up itself, unless there is something to look at first.
    would = json.loads(chvm(sandbox, "reap", "--dry-run", "--json").stdout)
    assert would == {"removed": [listed[0]["directory"].rpartition("/")[0]], "failures": []}
    assert [vm["state"] for vm in json.loads(chvm(sandbox, "ps", "--json").stdout)] == ["abandoned", "abandoned"]
    done = chvm(sandbox, "reap")
    assert done.returncode == 0
    assert done.stdout == f"removed {would['removed'][0]}\n"
    assert not sandbox.left_behind()

    living = start_pytest()
    living.news()
    before = sandbox.left_behind(timeout_s=0)
    assert chvm(sandbox, "reap").stdout == "nothing to remove\n"
    assert sandbox.left_behind(timeout_s=0).things >= before.things
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
    _heads, row = listed.stdout.splitlines()
    assert row.split()[:2] == ["red\ufffd", "abandoned"]
    reaped = chvm(sandbox, "reap")
    assert reaped.returncode == 1
    assert reaped.stdout == "removed /run/pytest-chvm/hostile\n"
    assert "\x1b" not in reaped.stderr
    for name in ("truncated", "list", "file"):
        assert f"chvm: /run/pytest-chvm/{name} is not understood (it " in reaped.stderr
    pytester.makepyfile("def test_vm(chvm_vm): chvm_vm(wait=False, networks=[])")
    run = start_pytest()
    assert run.wait() == 0, run.output
    left = {thing for thing in sandbox.left_behind().things if thing.count("/") == 3}
    assert {thing.rpartition("/")[2] for thing in left} == {"truncated", "list", "foreign", "file", "odd\x1bname"}

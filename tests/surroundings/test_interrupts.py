"""Ctrl-C while something is waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pytest_chvm import launch
from pytest_chvm.drivers.qemu import qmp
from tests.leaks import Sandbox

AT_ONCE_S = 5.0


def test_ctrl_c_does_not_wait_for_qemus_answer(tmp_path: Path, ctrl_c_interrupts: None) -> None:
    with launch(vmm="qemu", boot="clone", network="none", serial_log=tmp_path / "serial.log") as vm:
        assert vm.handle.run_dir is not None
        os.kill(vm.pid, signal.SIGSTOP)
        interrupt = threading.Timer(1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        interrupt.start()
        before = set(threading.enumerate())
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            qmp.session(vm.name, vm.handle.run_dir / "qmp.sock", lambda client: client.execute("query-status"), timeout_s=60)
        assert time.monotonic() - begun < AT_ONCE_S
        # The work is given up too.
        assert set(threading.enumerate()) <= before
        os.kill(vm.pid, signal.SIGCONT)
        assert vm.check_output("echo still there") == "still there\n"


HUNG_UP = """
    import os, signal, threading

    def test_goes_on(chvm_vm):
        vm = chvm_vm(boot="clone", network="none")
        os.killpg(0, signal.SIGHUP)
        assert vm.check_output("echo on") == "on\\n"
        print("went on", file=open(os.environ["NEWS"], "w"))
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()
"""


def test_a_run_under_nohup_outlives_its_terminal_and_ends_orderly(
    pytester: pytest.Pytester, user_environment: pytest.MonkeyPatch, sandbox: Sandbox
) -> None:
    pytester.makepyfile(HUNG_UP)
    news = pytester.path / "news"
    command = ["nohup", sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={pytester.path / 'basetemp'}"]
    done = subprocess.run(
        sandbox.command(*command, cwd=pytester.path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "NEWS": str(news), "TMPDIR": "/run/tmp"},
        process_group=0,
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stdout + done.stderr
    assert news.read_text() == "went on\n"
    assert "1 VM started; all gone" in done.stdout
    assert not sandbox.left_behind()


AFTERWARDS = """
import signal
from pytest_chvm.cli import main

main(["templates", "list", "--json"])
print(*(signal.getsignal(number) is signal.SIG_IGN for number in (signal.SIGHUP, signal.SIGTERM)))
"""


def test_the_command_ignores_what_it_was_started_to_ignore(tmp_path: Path) -> None:
    environment = {**os.environ, "CHVM_CACHE_DIR": str(tmp_path)}
    command = ["env", "--default-signal=TERM", "nohup", sys.executable, "-c", AFTERWARDS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, stdin=subprocess.DEVNULL)
    assert done.stdout.split()[-2:] == ["True", "False"]

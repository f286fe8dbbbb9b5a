"""Ctrl-C while something is waited for."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from pytest_chvm import launch
from pytest_chvm.drivers import qmp

AT_ONCE_S = 5.0


def test_ctrl_c_does_not_wait_for_qemus_answer(tmp_path: Path) -> None:
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

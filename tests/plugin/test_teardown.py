"""Teardown is bounded, whatever the VMs' processes do: all of a test's go at once, and none holds up another."""

from __future__ import annotations

import re

import pytest

from tests.leaks import Sandbox
from tests.runs import StartPytest


def test_stopped_vmms_and_hung_sidecars_of_a_test_and_of_the_session_go_within_4_s(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    pytester.makeconftest(
        """
        import pytest
        from pytest_chvm.base.deadline import Deadline

        @pytest.hookimpl(wrapper=True, tryfirst=True)
        def pytest_runtest_teardown(item):
            clock = Deadline.after(1000)
            try:
                return (yield)
            finally:
                print(f"TEARDOWN {clock.total_s - clock.remaining_s:.2f}")

        @pytest.hookimpl(wrapper=True)
        def pytest_sessionfinish(session):
            clock = Deadline.after(1000)
            try:
                return (yield)
            finally:
                print(f"TEARDOWN {clock.total_s - clock.remaining_s:.2f}")
        """
    )
    pytester.makepyfile(
        """
        import os, signal

        def test_hangs(chvm_vm, chvm_vm_factory, tmp_path):
            shares = {"a": tmp_path, "b": tmp_path, "c": tmp_path}
            vms = [start(wait=False, boot="cold", shared_dirs=shares) for start in (chvm_vm, chvm_vm, chvm_vm_factory)]
            for vm in vms:
                for process in (vm.handle.process, *vm.handle.sidecars):
                    os.kill(process.pid, signal.SIGSTOP)
        """
    )
    run = start_pytest("-s")
    assert run.wait(90) == 0, run.output
    times = [float(text) for text in re.findall(r"TEARDOWN ([\d.]+)", run.output)]
    assert len(times) == 2
    assert sum(times) < 4, times
    assert "3 VMs, 9 shares" in run.output
    assert not sandbox.left_behind()

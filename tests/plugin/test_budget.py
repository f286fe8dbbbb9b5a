"""The budget of the machine: VMs wait for their turn, are told what for, and all pass."""

from __future__ import annotations

import json
import queue
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pytest_chvm.host import budget as budget_module
from pytest_chvm.host import locks
from pytest_chvm.host.budget import Budget, take_share
from pytest_chvm.host.host import default_host
from pytest_chvm.host.leases import Lease
from tests.leaks import Sandbox
from tests.runs import RunPytest, StartPytest

EIGHT_TESTS = """
    import json, os, pathlib, time
    import pytest

    @pytest.mark.parametrize("number", range(8))
    def test_takes_its_turn(chvm_vm, number):
        vm = chvm_vm(memory_mb=256, boot="cold", networks=[], wait=False)
        started = time.monotonic()
        vm.wait_ready()
        pathlib.Path(os.environ["TIMES"], str(number)).write_text(json.dumps([started, time.monotonic()]))
"""


@pytest.mark.slow
def test_eight_workers_with_vms_of_half_the_budget_pass_two_at_a_time(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(EIGHT_TESTS)
    monkeypatch.setenv("TIMES", str(pytester.mkdir("times")))
    run = start_pytest("-n", "8", "--chvm-memory-budget-mb=512")
    assert run.wait(150) == 0, run.output
    times = [json.loads(path.read_text()) for path in pytester.path.joinpath("times").iterdir()]
    assert len(times) == 8
    # How many ran at each start, and each had its own deadline from its start on.
    assert max(sum(start <= at < end for start, end in times) for at, _end in times) == 2
    assert "8 VMs started; all gone" in run.output
    assert not sandbox.left_behind()


@pytest.mark.parametrize("limit", ["--chvm-memory-budget-mb=512", "--chvm-max-vms=1"])
def test_a_vm_that_waits_says_what_for(pytester: pytest.Pytester, start_pytest: StartPytest, limit: str) -> None:
    pytester.makepyfile(
        """
        import threading

        def test_waits(chvm_vm):
            first = chvm_vm(memory_mb=512, wait=False, boot="cold", networks=[])
            threading.Timer(5, first.close).start()
            chvm_vm(memory_mb=128, wait=False, boot="cold", networks=[], name="second")
        """
    )
    run = start_pytest(limit)
    assert run.wait(60) == 0, run.output
    waits = r"pytest-chvm: VM 'second' waits for 128 MiB and 1 processor\(s\) to boot with: 1 VMs have 512 of \d+ MiB.*; 1 wait"
    assert re.search(waits, run.output), run.output


def test_a_vm_that_can_never_fit_is_refused_at_once_with_the_numbers(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    pytester.makepyfile("def test_large(chvm_vm): chvm_vm(memory_mb=513, networks=[], boot='cold')")
    result = run_pytest("--chvm-memory-budget-mb=512")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E *MissingRequirementError: VM 'test-large' wants 513 MiB, and * may have 512 MiB: *"])
    assert not any(line.startswith("chvm: 1 VM") for line in result.outlines)


def test_those_that_are_up_keep_nobody_from_booting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Other runs of the machine boot too.
    for module in (budget_module, locks):
        monkeypatch.setattr(module, "common_lock_dir", lambda: tmp_path)
    budget = Budget(memory_mb=1000, cpus=1)
    leases = [Lease(default_host()), Lease(default_host())]
    try:
        first = take_share(budget, 100, 1, leases[0], "first", lambda said: None)
        said: queue.Queue[str] = queue.Queue()
        with ThreadPoolExecutor(1) as executor:
            second = executor.submit(take_share, budget, 100, 1, leases[1], "second", said.put)
            waits_for = said.get(timeout=120)
            was_done = second.done()
            first.booted()
            second.result(120).release()
        assert "1 boot with 1 of 1 processors" in waits_for
        assert not was_done
        first.release()
    finally:
        assert [failure for lease in leases for failure in lease.release()] == []

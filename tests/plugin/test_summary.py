"""What a test and a run say of what they have left: an error that names it, and one line at the end."""

from __future__ import annotations

import re
import signal

import pytest

from tests.leaks import Sandbox
from tests.runs import RunPytest, StartPytest

STARTS_VMS = """
    import pytest

    @pytest.mark.parametrize("number", range(3))
    def test_vms(chvm_vm, tmp_path, number):
        for index in range(number):
            chvm_vm(wait=False, network="tap" if index else "none", shared_dirs={} if index else {"code": tmp_path})

    def test_of_the_session(chvm_vm_factory):
        chvm_vm_factory(wait=False, network="none")
"""


@pytest.mark.usefixtures("needs_taps")
@pytest.mark.parametrize("arguments", [(), ("-n", "2")], ids=["plain", "xdist"])
def test_a_run_says_what_it_started_and_that_all_is_gone(
    pytester: pytest.Pytester, run_pytest: RunPytest, arguments: tuple[str, ...]
) -> None:
    pytester.makepyfile(STARTS_VMS)
    # Where it is the first of its kind, a VM for its template is started too.
    result = run_pytest("--chvm-boot=cold", *arguments)
    result.assert_outcomes(passed=4)
    (line,) = (line for line in result.outlines if line.startswith("chvm: ") and "started" in line)
    assert line == "chvm: 4 VMs, 2 shares, 1 TAP started; all gone"


def test_a_crashed_worker_is_cleaned_up_at_once_and_its_vms_are_counted(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    pytester.makepyfile(
        """
    import os, pathlib, signal

    def test_crashes(chvm_vm, tmp_path):
        chvm_vm(wait=False, shared_dirs={"code": tmp_path}, networks=[])
        os.kill(os.getpid(), signal.SIGKILL)

    def test_after_it(chvm_vm):
        # The directory is the other worker's, should it still be there.
        assert not list(pathlib.Path("/run").glob("pytest-chvm/*"))
        chvm_vm(wait=False, networks=[])
"""
    )
    run = start_pytest("-n", "1", "--chvm-boot=cold")
    assert run.wait(60) == 1
    assert "1 failed, 1 passed" in run.output
    assert "chvm: 2 VMs, 1 share started; all gone" in run.output
    assert not sandbox.left_behind()


LEAVES_A_MOUNT = """
    import subprocess

    def test_mounts(chvm_vm):
        vm = chvm_vm(name="busy", wait=False, networks=[])
        place = vm.handle.run_dir / "mounted"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "busy", place], check=True)

    def test_next(chvm_vm):
        chvm_vm(wait=False, networks=[])
"""


@pytest.mark.parametrize("arguments", [(), ("-n", "1")], ids=["plain", "xdist"])
def test_what_cannot_be_removed_is_an_error_of_its_test_and_named_at_the_end(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox, arguments: tuple[str, ...]
) -> None:
    pytester.makepyfile(LEAVES_A_MOUNT)
    run = start_pytest("--chvm-boot=cold", *arguments)
    assert run.wait(60) == 1
    assert "2 passed, 1 error" in run.output
    (mount,) = (thing.split()[1] for thing in sandbox.left_behind().things if thing.startswith("mount "))
    assert f"StopFailedError: VM 'busy': {mount}: Device or resource busy" in run.output
    assert "test_mounts has left behind: " in run.output
    summary = [line for line in run.output.splitlines() if line.startswith("chvm: ")]
    assert any(line.startswith("chvm: 2 VMs started; LEFT BEHIND: ") and mount in line for line in summary), summary
    assert any("chvm reap" in line for line in summary)


def test_a_vm_whose_finalizer_was_interrupted_is_ended_and_an_error_of_its_test(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    pytester.makepyfile(
        """
    import pathlib, pytest

    def test_interrupted(chvm_vm, chvm_network):
        vm = chvm_vm(name="left", wait=False)
        # As pytest-timeout does in a teardown: no Exception, and not this package's.
        vm.close = lambda: pytest.fail("interrupted")
        chvm_network()

    def test_next():
        assert not list(pathlib.Path("/run").glob("pytest-chvm/*/*/lease.json"))
"""
    )
    run = start_pytest()
    assert run.wait(60) == 1
    # What such a VM never closes is closed by the garbage collector, which Python warns of, if it comes to that within the run.
    assert re.search("2 passed,( 1 warning,)? 1 error", run.output)
    assert "test_interrupted has left behind: process " in run.output
    assert "started; all gone" in run.output
    assert not sandbox.left_behind()


@pytest.mark.parametrize("arguments", [(), ("-n", "1")], ids=["plain", "xdist"])
def test_sigterm_is_an_orderly_end_in_which_finalizers_run(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox, arguments: tuple[str, ...]
) -> None:
    pytester.makepyfile(
        """
    import os, threading
    import pytest

    def tell(text):
        with open(os.environ["NEWS"], "w") as news:
            print(text, file=news)

    @pytest.fixture
    def other():
        yield
        tell("finalizer")

    def test_waits(other, chvm_vm):
        chvm_vm(wait=False, networks=[])
        tell("waits")
        threading.Event().wait()

    def test_not_run(chvm_vm):
        tell("run all the same")
"""
    )
    run = start_pytest("--chvm-boot=cold", *arguments)
    assert run.news() == "waits"
    run.signal(signal.SIGTERM)
    assert run.news() == "finalizer"
    assert run.wait() == 143
    assert "chvm: 1 VM started; all gone" in run.output
    assert not sandbox.left_behind()
    assert "INTERNALERROR" not in run.output


def test_a_worker_alone_that_gets_sigterm_ends_the_run_in_order(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    pytester.makepyfile(
        """
    import os, signal, threading

    def test_ends(chvm_vm):
        chvm_vm(wait=False, networks=[])
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()
"""
    )
    run = start_pytest("-n", "1", "--chvm-boot=cold")
    assert run.wait() == 2
    assert "SIGTERM" in run.output
    assert "INTERNALERROR" not in run.output
    assert "chvm: 1 VM started; all gone" in run.output
    assert not sandbox.left_behind()


def test_sigterm_is_left_to_whoever_handles_it_and_to_runs_without_vms(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    pytester.makepyfile(
        test_without="""
        import signal

        def test_plain():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        """,
        test_with="""
        import os, signal, sys

        def test_handled(chvm_vm):
            os.kill(os.getpid(), signal.SIGTERM)
            assert sys.modules["conftest"].told == [signal.SIGTERM]
        """,
    )
    run_pytest("test_without.py").assert_outcomes(passed=1)
    pytester.makeconftest("import signal\ntold = []\nsignal.signal(signal.SIGTERM, lambda number, _frame: told.append(number))\n")
    run_pytest("test_with.py").assert_outcomes(passed=1)

"""Who may end a VM: the process that made it, and the run it belongs to; and when a clone ends."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from pytest_chvm import launch
from tests.runs import RunPytest


@pytest.fixture(scope="module", autouse=True)
def templates(guest_cache: Path) -> None:
    """A VM for a template, were the template still to be made, would be counted with the run's own."""
    for networks in (None, []):
        with launch(boot="clone", networks=networks):
            pass


def test_a_forked_child_that_leaves_by_an_exception_ends_nothing(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    pytester.makepyfile(
        """
        import os, sys
        import pytest
        from pytest_chvm import UnsupportedError, launch

        def forked(child):
            pid = os.fork()
            if pid == 0:
                sys.stdout = sys.stderr = open(os.devnull, "w")
                # The run that goes on in the child must not be heard.
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                child()
                sys.exit(0)
            _pid, status = os.waitpid(pid, 0)
            return os.waitstatus_to_exitcode(status)

        def refused(end):
            try:
                end()
            except UnsupportedError:
                return
            os._exit(99)

        @pytest.fixture(scope="module")
        def shared(chvm_vm_factory):
            return chvm_vm_factory()

        def test_one(chvm_vm, chvm_network, shared):
            vm = chvm_vm(networks=[chvm_network()])
            saved = vm.snapshot()
            # The child goes on as pytest does after a failed test: to the end of its run.
            assert forked(lambda: None) == 1
            assert forked(lambda: [refused(end) for end in (vm.kill, vm.stop, vm.shutdown)] and os._exit(0)) == 0
            assert vm.check_output("echo here") == "here\\n"
            assert shared.check_output("echo here") == "here\\n"
            assert saved.clone().check_output("echo a clone") == "a clone\\n"
            vm.kill()

        def test_the_shared_one_is_still_there(shared):
            assert shared.check_output("echo here") == "here\\n"

        def test_with_a_context(chvm_settings):
            with launch() as vm:
                assert forked(lambda: None) == 1
                assert vm.check_output("echo here") == "here\\n"
        """
    )
    result = run_pytest("-x")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["chvm: 4 VMs*; all gone"])
    assert "LEFT BEHIND" not in result.stdout.str() + result.stderr.str()


INNER_RUNS = """
    pytest_plugins = ["pytester"]

    def test_outer(chvm_vm, pytester):
        vm = chvm_vm(name="same")

        def run_within(test):
            pytester.makepyfile(test)
            inner = pytester.runpytest_inprocess("-p", "no:cacheprovider")
            inner.assert_outcomes(passed=1)
            inner.stdout.no_fnmatch_line("*LEFT BEHIND*")
            assert vm.check_output("echo here") == "here\\n"
            return inner.stdout

        run_within("def test_plain(): pass").no_fnmatch_line("chvm: *")
        run_within(
            "def test_vm(chvm_vm): assert chvm_vm(name='same').check_output('echo inner') == 'inner\\\\n'"
        ).fnmatch_lines(["chvm: 1 VM, 1 TAP started; all gone"])
        assert chvm_vm().check_output("echo another") == "another\\n"
"""


@pytest.mark.parametrize("arguments", [(), ("-n", "1")], ids=["plain", "xdist"])
def test_a_run_within_a_test_ends_its_own_vms_only(
    pytester: pytest.Pytester,
    run_pytest: RunPytest,
    needs_taps: None,
    arguments: tuple[str, ...],
) -> None:
    pytester.makepyfile(INNER_RUNS)
    result = run_pytest(*arguments)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["chvm: 2 VMs, 2 TAPs started; all gone"])


def test_runs_of_one_process_have_each_what_they_started_themselves(
    pytester: pytest.Pytester, user_environment: pytest.MonkeyPatch
) -> None:
    """Two runs, one after the other, each with one within it."""
    pytester.makepyfile(
        test_outer="""
        import pytest
        from pytest_chvm import launch

        def test_with_a_run_within():
            # Left running: its run ends it.
            vm = launch(name="same", networks=[])
            assert pytest.main(["test_inner.py", "-pno:cacheprovider"]) == 0
            assert vm.check_output("echo here") == "here\\n"

        def test_fixture(chvm_vm):
            chvm_vm(networks=[])
        """,
        test_inner="def test_inner(chvm_vm): chvm_vm(name='same', networks=[])",
        run="""
        import pytest
        from pytest_chvm import launch
        from pytest_chvm.host.host import Host

        # The template is not to be counted.
        launch(networks=[], host=Host()).close()
        for number in range(2):
            assert pytest.main(["test_outer.py", "-s"]) == 0
        """,
    )
    result = pytester.run(sys.executable, "run.py")
    counts = re.findall(r"^chvm: (\d+) VM.* started; all gone$", result.stdout.str(), re.M)
    assert counts == ["1", "2", "1", "2"], result.stdout.str() + result.stderr.str()


def test_a_clone_ends_with_the_fixture_or_test_that_made_it(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    pytester.makepyfile(
        """
        import os
        import pytest

        ended = {}

        def is_there(vm):
            return os.path.exists(f"/proc/{vm.pid}")

        @pytest.fixture(scope="session")
        def saved(chvm_vm_factory):
            return chvm_vm_factory(networks=[]).snapshot()

        @pytest.fixture(scope="session")
        def of_session(saved):
            return saved.clone()

        @pytest.fixture(scope="class")
        def of_class(saved, of_session):
            vm = saved.clone()
            yield vm
            # Its own teardown is before its clone's.
            assert vm.check_output("echo here") == "here\\n"
            ended["class"] = vm

        @pytest.fixture
        def of_function(saved):
            yield saved.clone()
            # A clone of a teardown ends with that.
            ended["teardown"] = saved.clone()
            assert ended["teardown"].check_output("echo late") == "late\\n"

        class TestFirst:
            def test_one(self, of_class, of_function, of_session, saved):
                ended["function"] = of_function
                ended["test"] = saved.clone()
                assert all(map(is_there, (of_class, of_function, of_session, ended["test"])))

            def test_two(self, of_class, of_session):
                assert is_there(of_class) and is_there(of_session)
                assert of_class.check_output("echo here") == "here\\n"
                assert not any(is_there(ended[what]) for what in ("function", "test", "teardown"))

        def test_three(of_session, request, saved):
            assert not is_there(ended["class"])
            assert of_session.check_output("echo here") == "here\\n"
        """
    )
    result = run_pytest()
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["chvm: 6 VMs*; all gone"])

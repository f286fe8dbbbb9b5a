"""Tests that run in a guest: what comes back of them. The guest's pytest is a process of the host's here, where it starts in a second."""

from __future__ import annotations

import json

import pytest

from pytest_chvm.plugin.inside.wire import relay_warning, unpack_report
from tests.runs import RunPytest

# Gives the tests a shell of the host's in place of a guest's.
NO_VM = """
    import os, re, shutil, signal, subprocess

    from pytest_chvm.model import CommandResult
    from pytest_chvm.plugin.inside import places


    class HostShell:
        def __init__(self, factory):
            self.groups, self.places = set(), set()
            factory.close = self.close

        def run(self, command, *, timeout=60, input=b""):
            self.places.update(re.findall("/tmp/chvm-inside-[0-9a-f]+", command))
            data = input.encode(errors="surrogateescape") if isinstance(input, str) else input
            process = subprocess.Popen(["sh", "-c", command], stdin=-1, stdout=-1, stderr=-1, process_group=0)
            self.groups.add(process.pid)
            out, err = process.communicate(data, timeout=timeout)
            return CommandResult(command, process.returncode, out, err, 0.0)

        def close(self):
            for group in self.groups:
                try:
                    os.killpg(group, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            # It goes with a guest.
            for place in self.places:
                shutil.rmtree(place, ignore_errors=True)
                if os.path.exists(place + ".sh"):
                    os.unlink(place + ".sh")


    places.boot = lambda config, factory: (HostShell(factory), False)
"""


@pytest.fixture
def run_inside(pytester: pytest.Pytester, run_pytest: RunPytest) -> RunPytest:
    pytester.makeconftest(NO_VM)
    return run_pytest


def test_each_outcome_is_that_of_the_test_in_the_guest(pytester: pytest.Pytester, run_inside: RunPytest) -> None:
    pytester.makepyfile(
        """
        import logging, os, sys, warnings
        import pytest

        pytestmark = pytest.mark.chvm(inside="module")

        def there(): return sys.modules["__main__"].__file__.endswith("program.py")

        @pytest.fixture
        def broken():
            yield
            raise ValueError("at the end")

        @pytest.mark.parametrize("what", ["a b", "ü/[::]'", "$(id)\\n"])
        def test_parameters(what, record_property):
            record_property("what", what)
            assert there()

        def test_fails():
            print("it is printed")
            logging.getLogger("mine").warning("it is logged")
            left = [1, 2]
            assert left == [1, 3]

        def test_warns(): warnings.warn("careful", DeprecationWarning)

        @pytest.mark.skipif("not there()", reason="out here")
        def test_skips(): pytest.skip("in the middle")

        @pytest.mark.xfail(strict=True)
        def test_passes_strictly(): pass

        @pytest.mark.xfail(reason="known")
        def test_fails_as_expected(): assert 0

        def test_lacks(nothing): pass
        def test_ends_badly(broken): pass
        """
    )
    result = run_inside("-rA", "-v")
    result.assert_outcomes(passed=5, failed=2, errors=2, skipped=1, xfailed=1, warnings=1)
    result.stdout.fnmatch_lines(
        [
            "*fixture 'nothing' not found*",
            "*ERROR at teardown of test_ends_badly*",
            "E       ValueError: at the end",
            ">       assert left == [[]1, 3[]]",
            "E       *assert [[]1, 2[]] == [[]1, 3[]]",
            "E         At index 1 diff: 2 != 3",
            "it is printed",
            "WARNING  mine:*it is logged",
            "*[[]XPASS(strict)[]]*",
            "*test_warns",
            "*DeprecationWarning: careful*",
            "SKIPPED [[]1[]] test_*: in the middle",
        ]
    )


def test_what_cannot_run_in_a_guest_is_said(pytester: pytest.Pytester, run_inside: RunPytest) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.chvm(inside=True)
        def test_with_a_vm(chvm_vm): pass

        @pytest.mark.chvm(inside="yes")
        def test_of_no_kind(): pass

        @pytest.mark.chvm(inside=True)
        def test_asks_late(request): request.getfixturevalue("chvm_network")
        """
    )
    result = run_inside()
    result.assert_outcomes(failed=1, errors=2)
    result.stdout.fnmatch_lines(
        [
            "InvalidConfigError: *::test_with_a_vm runs in a guest (inside=True), where chvm_vm cannot be: *",
            "InvalidConfigError: inside='yes', expected True * or 'module' *",
            "E *UnsupportedError: this test runs in a guest*",
        ]
    )
    debugged = run_inside("--pdb", "-k", "asks_late")
    debugged.assert_outcomes(errors=1)
    debugged.stdout.fnmatch_lines(["InvalidConfigError: --pdb cannot be used with *::test_asks_late: it runs in a guest *"])


def test_the_tests_of_a_module_share_a_guest_and_their_fixtures_until_it_dies(
    pytester: pytest.Pytester, run_inside: RunPytest
) -> None:
    pytester.makepyfile(
        """
        import os
        import pytest

        inside = pytest.mark.chvm(inside="module")
        PLACES = {}

        @pytest.fixture(scope="module")
        def place():
            yield os.getpid()
            raise ValueError("the module's end")

        @pytest.fixture(scope="class", params=[1, 2])
        def each(request, place): return place, request.param

        @inside
        def test_first(place, tmp_path):
            PLACES["first"] = place
            (tmp_path / "file").write_text(str(tmp_path))
            assert str(tmp_path).startswith("/tmp/chvm-inside-")

        def test_out_here(): assert not PLACES

        @inside
        class TestClass:
            def test_a(self, each): assert PLACES["first"] == os.getpid() == each[0]
            def test_b(self, each): PLACES["last"] = each

        @inside
        def test_next(place): assert PLACES["last"] == (place, 2)
        @inside
        def test_dies(place): os.write(1, b"not captured\\n"), os.write(2, b"last words\\n"), os._exit(7)
        @inside
        def test_in_a_new_one(place): assert not PLACES
        """
    )
    result = run_inside("-v")
    result.assert_outcomes(passed=8, failed=1, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_in_a_new_one*",
            "E       ValueError: the module's end",
            "*test_dies*",
            "PytestEndedError: the pytest in the guest has ended, with exit status 7, before the test had*",
        ]
    )


def test_reruns_workers_and_coverage_are_as_for_other_tests(pytester: pytest.Pytester, run_inside: RunPytest) -> None:
    pytest.importorskip("pytest_cov")
    pytester.makepyfile(
        covered="""
        def called():
            return 1


        def not_called():
            return 2
        """,
        test_it="""
        import covered
        import pytest

        pytestmark = pytest.mark.chvm(inside=True)
        ATTEMPTS = []

        def test_covers(worker_id, request):
            assert covered.called() == 1
            assert not hasattr(request.config, "workerinput")

        def test_fails_each_time(): assert 0
        """,
    )
    result = run_inside("-n", "2", "--reruns", "1", "--cov=covered", "--cov-report=term-missing", "-v")
    assert result.parseoutcomes() == {"passed": 1, "failed": 1, "rerun": 1}
    result.stdout.fnmatch_lines(["covered.py * 75%   6"])


def test_time_limits_outputs_and_exits_are_as_for_other_tests(pytester: pytest.Pytester, run_inside: RunPytest) -> None:
    pytester.makepyfile(
        """
        import time
        import pytest

        pytestmark = pytest.mark.chvm(inside="module")

        @pytest.mark.timeout(1)
        def test_too_long(tmp_path):
            print("shown at once")
            time.sleep(60)

        def test_exits(): pytest.exit("enough")
        def test_never_runs(): pass
        """
    )
    result = run_inside("-s", "--setup-show")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.assert_outcomes(failed=1)
    timed_out = "E       Failed: Timeout (>1.0s) from pytest-timeout."
    result.stdout.fnmatch_lines(
        ["*SETUP *tmp_path *", "*test_too_long *shown at once", ">       time.sleep(60)", timed_out, "*Exit: enough*"]
    )
    stopped = run_inside("-x", "--maxfail=1", "-k", "too_long or never")
    stopped.assert_outcomes(failed=1)
    planned = run_inside("--setup-plan", "-k", "never")
    planned.stdout.fnmatch_lines(["*test_never_runs*"])
    planned.assert_outcomes()


def test_what_a_guest_sends_that_is_no_report_is_refused(pytester: pytest.Pytester) -> None:
    item = pytester.getitem("def test_func(): pass")
    call = pytest.CallInfo.from_call(lambda: None, "call")
    good = pytest.TestReport.from_item_and_call(item, call)._to_json() | {"$report_type": "TestReport"}
    given = unpack_report(item, json.loads(json.dumps({**good, "nodeid": "another", "user_properties": [["a", 1]]})))
    assert (given.nodeid, given.location, given.user_properties) == (item.nodeid, item.location, [("a", 1)])
    for bad in (
        None,
        [],
        {},
        {**good, "$report_type": "CollectReport"},
        {**good, "$report_type": "Nothing"},
        {**good, "outcome": "great"},
        {**good, "when": "later"},
        {**good, "outcome": "skipped", "longrepr": "no place"},
        {**good, "duration": "long"},
        {**good, "longrepr": {"reprcrash": 1, "reprtraceback": 2}},
    ):
        with pytest.raises(ValueError):
            unpack_report(item, bad)
    for bad in (None, {}, {"message": "m", "filename": "f", "lineno": "1"}):
        with pytest.raises(ValueError):
            relay_warning(item, bad)

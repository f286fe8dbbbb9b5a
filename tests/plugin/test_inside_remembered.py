"""What a pytest in a guest remembers of its plugins: nothing that one without memory would not find."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from pytest_chvm.plugin.inside import program, resident

RUN = f"""
import importlib.util, sys

spec = importlib.util.spec_from_file_location("program", {program.__file__!r})
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
if sys.argv.pop(1) == "again":
    program.load([])
print("from here", flush=True)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_fixtures_hooks_and_warnings_are_those_of_a_first_run(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import functools
        import pytest, pytest_timeout

        def other(): return pytest_timeout.is_debugging
        # Of a plugin that was looked at before: one that is new, and one in the place of something else.
        pytest_timeout.added = pytest.fixture(name="added")(lambda: 1)
        pytest_timeout.is_debugging = pytest.fixture(name="instead")(lambda: 2)
        pytest_timeout.pytest_report_header = lambda config: "a header of the conftest's"

        @staticmethod
        @pytest.fixture
        def wrapped(): return 3
        """
    )
    pytester.makepyfile(
        """
        import importlib.metadata
        import pytest

        class TestClass:
            @pytest.fixture
            def own(self): return 4
            def test_all(self, added, instead, own): assert (added, instead, own) == (1, 2, 4)

        def test_distributions():
            assert next(iter(importlib.metadata.distributions(name="pytest"))).version == pytest.__version__
            assert sum(1 for _ in importlib.metadata.distribution("pytest").entry_points) > 0
        def test_fails(nothing): pass
        """
    )
    first, again = (_run(pytester, how) for how in ("first", "again"))
    assert "2 passed" in first
    assert "fixture 'nothing' not found" in first
    assert "added -- " in first
    assert again == first


def _run(pytester: pytest.Pytester, how: str) -> str:
    said = ""
    for arguments in (["--fixtures", "-v"], ["-rA", "-p", "no:cacheprovider", "--trace-config"]):
        command = [sys.executable, "-c", RUN, how, *arguments]
        done = subprocess.run(command, cwd=pytester.path, capture_output=True, text=True, timeout=120, check=False)
        said += done.stdout.partition("from here\n")[2]
    return re.sub(r"0x[0-9a-f]+|\b\d{15}\b|\d+\.\d+s", "...", said)


def test_what_is_not_to_be_loaded_is_not_loaded_before_its_run_either(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:faulthandler")
    pytester.makeini("[pytest]\naddopts = -p no:doctest\n")
    config = pytester.parseconfig("-p", "no:pastebin", "-pno:terminal", "-p", "pytester")
    assert resident._plugin_arguments(config) == ["-pno:doctest", "-pno:faulthandler", "-pno:pastebin"]

"""A run that uses no VM does not notice the plugin: nothing is printed, and nothing heavy is imported."""

from __future__ import annotations

import json

import pytest

from .conftest import RunPytest

HEAVY = {
    "asyncio",
    "filelock",
    "http.client",
    "httpx",
    "inotify_simple",
    "psutil",
    "pycdlib",
    "pyroute2",
    "pytest_chvm.cli",
    "pytest_chvm.drivers",
    "pytest_chvm.errors",
    "pytest_chvm.host",
    "pytest_chvm.guest",
    "pytest_chvm.launcher",
    "pytest_chvm.model",
    "pytest_chvm.report",
    "pytest_chvm.snapshots",
    "pytest_chvm.vm",
    "qemu",
    "qemu.qmp",
    "zstandard",
}


def test_nothing_heavy_is_imported(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    pytester.makepyfile("def test_plain(tmp_path): pass\ndef test_fails(): raise AssertionError('on purpose')")
    pytester.makeconftest(
        """
        import json, pathlib, sys

        def pytest_unconfigure(config):
            pathlib.Path(config.rootpath, "modules.json").write_text(json.dumps(sorted(sys.modules)))
        """
    )
    # Other plugins that happen to be installed import what they like.
    run_pytest("-p", "no:xdist", "-p", "no:anyio", "-p", "no:hypothesispytest").assert_outcomes(passed=1, failed=1)
    modules = set(json.loads(pytester.path.joinpath("modules.json").read_text()))
    assert "pytest_chvm.plugin" in modules
    assert not modules & HEAVY


@pytest.mark.parametrize("arguments", [(), ("-n", "1")], ids=["plain", "xdist"])
def test_nothing_is_printed(pytester: pytest.Pytester, run_pytest: RunPytest, arguments: tuple[str, ...]) -> None:
    # A directory of that name is among the test's keywords, as the marker would be.
    pytester.mkdir("chvm").joinpath("test_plain.py").write_text("def test_plain(): pass\ndef test_fails(): assert 0\n")
    result = run_pytest(*arguments)
    result.assert_outcomes(passed=1, failed=1)
    said = [line for line in result.outlines + result.errlines if not line.startswith(("rootdir:", "plugins:"))]
    assert not [line for line in said if "chvm:" in line or "VMM" in line]

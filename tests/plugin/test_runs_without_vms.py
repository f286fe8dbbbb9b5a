"""A run that uses no VM does not notice the plugin: nothing is printed, and nothing heavy is imported."""

from __future__ import annotations

import json

import pytest

from tests.runs import RunPytest

ROOMS = ("collection", "end", "expect", "fixtures", "keys", "marker", "options", "protocol", "run")
LIGHT = {
    *("pytest_chvm", "pytest_chvm.settings", "pytest_chvm.plugin"),
    *("pytest_chvm.base", "pytest_chvm.base.choices", "pytest_chvm.base.untouched"),
    *(f"pytest_chvm.plugin.{room}" for room in ROOMS),
}


def test_the_plugin_s_light_modules_are_all_that_is_imported(
    pytester: pytest.Pytester, run_pytest: RunPytest, user_environment: pytest.MonkeyPatch
) -> None:
    user_environment.delenv("CHVM_CACHE_DIR")
    pytester.makepyfile("def test_plain(tmp_path): pass\ndef test_fails(): raise AssertionError('on purpose')")
    pytester.makeconftest(
        """
        import json, pathlib, sys

        def pytest_unconfigure(config):
            pathlib.Path(config.rootpath, "modules.json").write_text(json.dumps(sorted(sys.modules)))
        """
    )
    modules = {}
    for plugin in ("chvm", "no:chvm"):
        run_pytest("-p", plugin).assert_outcomes(passed=1, failed=1)
        modules[plugin] = set(json.loads(pytester.path.joinpath("modules.json").read_text()))
    added = modules["chvm"] - modules["no:chvm"]
    assert added == LIGHT


@pytest.mark.parametrize("arguments", [(), ("-n", "1")], ids=["plain", "xdist"])
def test_nothing_is_printed(pytester: pytest.Pytester, run_pytest: RunPytest, arguments: tuple[str, ...]) -> None:
    # A directory of that name is among the test's keywords, as the marker would be.
    pytester.mkdir("chvm").joinpath("test_plain.py").write_text("def test_plain(): pass\ndef test_fails(): assert 0\n")
    result = run_pytest(*arguments)
    result.assert_outcomes(passed=1, failed=1)
    said = [line for line in result.outlines + result.errlines if not line.startswith(("rootdir:", "plugins:"))]
    assert not [line for line in said if "chvm:" in line or "VMM" in line]

"""Plugins that people have beside this one, all at once."""

from __future__ import annotations

import pytest

from tests.runs import RunPytest

PLUGINS = {"randomly": "pytest_randomly", "forked": "pytest_forked", "asyncio": "pytest_asyncio.plugin"}

TESTS = """
    import asyncio, os, random
    import pytest

    @pytest.fixture(scope="module")
    def saved(chvm_vm_factory):
        return chvm_vm_factory(name="saved").snapshot()

    @pytest.mark.parametrize("number", range(3))
    def test_of_one_seed(chvm_vm, number):
        random.seed(1)
        vms = [chvm_vm(), chvm_vm()]
        assert len({vm.ip for vm in vms}) == 2
        random.seed(1)
        assert chvm_vm().check_output("echo here") == "here\\n"

    @pytest.mark.timeout(100)
    def test_a_clone(saved):
        assert saved.clone().check_output("echo here") == "here\\n"

    @pytest.mark.flaky(reruns=1)
    def test_again(chvm_vm, saved, tmp_path_factory):
        tried = tmp_path_factory.getbasetemp() / "tried"
        assert chvm_vm(name="again").check_output("hostname") == "again\\n"
        if not tried.exists():
            tried.touch()
            raise AssertionError("once")
"""


@pytest.fixture
def others() -> list[str]:
    """Arguments that load the other plugins, which are not loaded by themselves in this project's runs."""
    for module in PLUGINS.values():
        pytest.importorskip(module.partition(".")[0], reason=f"{module} is not installed")
    return [argument for module in PLUGINS.values() for argument in ("-p", module)]


@pytest.mark.parametrize("arguments", [("-p", "no:xdist"), ("-n", "2"), ("--forked",)], ids=["plain", "xdist", "forked"])
def test_all_pass_and_leave_nothing(
    pytester: pytest.Pytester,
    run_pytest: RunPytest,
    user_environment: pytest.MonkeyPatch,
    others: list[str],
    arguments: tuple[str, ...],
) -> None:
    user_environment.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    loaded = [word for name in ("chvm", "timeout", "rerunfailures") for word in ("-p", name)]
    if arguments[0] == "-n":
        loaded += ["-p", "xdist"]
    if arguments == ("--forked",):
        pytester.makepyfile("def test_plain(): pass")
        if run_pytest("-p", "pytest_forked", "--forked").ret != 0:
            pytest.skip("pytest-forked does not work with this pytest, whatever the test")
    # In a forked child there is one attempt, with or without this plugin.
    attempts = ("-k", "not again") if arguments == ("--forked",) else ()
    pytester.makepyfile(TESTS)
    result = run_pytest(*loaded, *others, "-p", "no:cacheprovider", *arguments, *attempts, "-p", "no:warnings")
    result.assert_outcomes(passed=4 if attempts else 5, deselected=1 if attempts else 0)
    assert "LEFT BEHIND" not in result.stdout.str()

"""The marker: arguments for a test's VMs, and what -m selects by."""

from __future__ import annotations

import pytest

from tests.runs import RunPytest

USERS_OF_VMS = """
    import pytest

    @pytest.fixture
    def machine(chvm_vm):
        raise AssertionError("not reached: the tests are only collected")

    @pytest.fixture(scope="session")
    def shared_machine(chvm_vm_factory):
        raise AssertionError("not reached: the tests are only collected")

    def test_direct(chvm_vm): pass
    def test_network(chvm_network): pass
    def test_factory(chvm_vm_factory): pass
    def test_indirect(machine): pass
    def test_indirect_session(shared_machine): pass

    @pytest.mark.usefixtures("machine")
    def test_by_usefixtures(): pass

    @pytest.mark.chvm
    def test_by_hand(): pass

    class TestClass:
        @pytest.fixture(autouse=True)
        def always(self, machine): pass

        def test_autouse(self): pass

    def test_plain(tmp_path): pass
    def test_settings_only(chvm_settings): pass
"""


def _collected(result: pytest.RunResult) -> set[str]:
    return {line.split("::", 1)[1] for line in result.outlines if "::" in line}


def test_m_chvm_selects_every_test_that_uses_a_vm_and_m_not_chvm_the_others(
    pytester: pytest.Pytester, run_pytest: RunPytest
) -> None:
    pytester.makepyfile(USERS_OF_VMS)
    with_vm = run_pytest("--collect-only", "-q", "--strict-markers", "-m", "chvm")
    assert _collected(with_vm) == {
        "test_direct",
        "test_network",
        "test_factory",
        "test_indirect",
        "test_indirect_session",
        "test_by_usefixtures",
        "test_by_hand",
        "TestClass::test_autouse",
    }
    without = run_pytest("-v", "--strict-markers", "-m", "not chvm")
    without.assert_outcomes(passed=2, deselected=8)
    without.stdout.no_fnmatch_line("*chvm: VMM*")
    run_pytest("--markers").stdout.fnmatch_lines(["@pytest.mark.chvm(*config): *"])


def test_the_closest_marker_wins_argument_by_argument(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    pytester.makepyfile(
        """
        import pytest

        pytestmark = pytest.mark.chvm(cpus=2, memory_mb=101, cmdline="console=ttyS0 module", wait=False, networks=[])

        @pytest.mark.chvm(memory_mb=102, cmdline="console=ttyS0 class")
        class TestClass:
            @pytest.mark.chvm(cmdline="console=ttyS0 function")
            def test_merged(self, chvm_vm):
                config = chvm_vm().config
                assert (config.cpus, config.memory_mb) == (2, 102)
                assert "function" in config.cmdline

            # Falsy is not the same as not given, and an argument of the call comes before any marker.
            @pytest.mark.chvm(cmdline="")
            def test_falsy_and_argument(self, chvm_vm):
                config = chvm_vm(cpus=1, networks=[]).config
                assert (config.cpus, config.memory_mb) == (1, 102)
                assert config.cmdline.split()[0].startswith("chvm.")
                assert config.networks == ()

        def test_of_the_module_only(chvm_vm):
            assert chvm_vm().config.memory_mb == 101
        """
    )
    run_pytest("--chvm-cpus=1", "--chvm-memory-mb=99", "--strict-markers").assert_outcomes(passed=3)


def test_an_unknown_argument_lists_the_near_ones(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    pytester.makepyfile(
        """
        import pytest

        def test_of_the_call(chvm_vm):
            chvm_vm(memory=512)

        @pytest.mark.chvm(shared_dir={})
        def test_of_the_marker(chvm_vm):
            chvm_vm()
        """
    )
    result = run_pytest()
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            "E *InvalidConfigError: a VM has no argument 'memory'; did you mean memory_mb?*",
            "E *InvalidConfigError: a VM has no argument 'shared_dir'; did you mean shared_dirs?*",
        ]
    )

"""The kernel's own tests as tests of a run: --chvm-kselftest and --chvm-kunit."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_chvm.plugin.kernel_tests import kselftest_timeout_s
from tests.runs import RunPytest

# What the kernel's own has of it.
LIB_MK = r"""
emit_tests:
	for TEST in $(TEST_GEN_PROGS) $(TEST_CUSTOM_PROGS) $(TEST_PROGS); do \
		BASENAME_TEST=`basename $$TEST`; \
		echo "$(COLLECTION):$$BASENAME_TEST"; \
	done
"""
PROGRAMS = {
    "tap.sh": "#!/bin/sh\nprintf '%s\\n' 'TAP version 13' 1..2 'ok 1 first' 'not ok 2 second'; exit 1\n",
    "plain.sh": "#!/bin/sh\n. ./helper; says $(pwd)\n",
    # As kcmp_test of the kernel's own does.
    "counts.sh": "#!/bin/sh\nprintf '%s\\n' 'TAP version 13' 1..2 '# Totals: pass:2 fail:0 xfail:0 xpass:0 skip:0 error:0'\n",
    "helper": "says() { echo in $1; }\n",
}


@pytest.fixture
def target(pytester: pytest.Pytester) -> Path:
    """A target of kselftest in a tree."""
    selftests = pytester.path / "linux" / "tools" / "testing" / "selftests"
    directory = selftests / "odd"
    directory.mkdir(parents=True)
    (selftests / "lib.mk").write_text(LIB_MK)
    (directory / "Makefile").write_text("TEST_PROGS := tap.sh plain.sh counts.sh\nTEST_GEN_PROGS := unbuilt\ninclude ../lib.mk\n")
    (directory / "settings").write_text("# a comment\ntimeout=120\n")
    for name, text in PROGRAMS.items():
        (directory / name).write_text(text)
        # One may lack the permission, as in the kernel's own tree.
        (directory / name).chmod(0o644 if name == "plain.sh" else 0o755)
    return directory


@pytest.mark.skipif(pytest.version_tuple < (9,), reason="pytest has subtests from 9 on")
def test_the_programs_of_a_target_are_tests_each_in_a_vm(pytester: pytest.Pytester, run_pytest: RunPytest, target: Path) -> None:
    pytester.makepyfile(test_other="def test_other(): raise AssertionError")
    result = run_pytest("-v", "--chvm-kselftest=linux/tools/testing/selftests/odd", "-m", "chvm")
    result.stdout.fnmatch_lines_random(
        [
            "kselftest/odd::unbuilt FAILED*",
            "*unbuilt is not there: build it (make -C *",
            "kselftest/odd::tap.sh SUBPASSED*first*",
            "kselftest/odd::tap.sh SUBFAILED*second*",
            "kselftest/odd::plain.sh PASSED*",
            "kselftest/odd::counts.sh PASSED*",
        ]
    )
    assert not [line for line in result.outlines if "test_other" in line]


@pytest.mark.parametrize(("text", "timeout_s"), [("", 45), ("timeout=120\n", 120), ("#timeout=3\n", 45), ("timeout=0\n", None)])
def test_a_target_says_how_long_its_programs_may_take(tmp_path: Path, text: str, timeout_s: int | None) -> None:
    (tmp_path / "settings").write_text(text)
    assert kselftest_timeout_s(tmp_path) == timeout_s


def test_the_list_of_an_installed_tree_is_taken(pytester: pytest.Pytester, run_pytest: RunPytest, target: Path) -> None:
    (target / "Makefile").unlink()
    (target.parent / "kselftest-list.txt").write_text("odd:tap.sh\nodder:no.sh\nodd:plain.sh\n")
    result = run_pytest("--collect-only", "-q", f"--chvm-kselftest={target}", "--chvm-kunit=boot")
    assert [line for line in result.outlines if "::" in line] == ["kselftest/odd::tap.sh", "kselftest/odd::plain.sh", "kunit::boot"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--chvm-kselftest=nowhere", "*--chvm-kselftest=*nowhere: there is no such directory"),
        ("--chvm-kselftest=.", "*--chvm-kselftest=*: expected a target of kselftest, with a Makefile, or of an installed tree"),
        ("--chvm-kselftest=broken", "*--chvm-kselftest=*broken: make cannot be asked for its tests: *oh no*"),
        ("--chvm-kunit=none.ko", "*--chvm-kunit=none.ko: expected a kernel module's file, or 'boot'"),
    ],
)
def test_what_has_no_tests_is_an_error(pytester: pytest.Pytester, run_pytest: RunPytest, option: str, message: str) -> None:
    pytester.mkdir("broken").joinpath("Makefile").write_text("$(error oh no)\n")
    result = run_pytest(option)
    result.stdout.fnmatch_lines([message])
    assert result.ret == pytest.ExitCode.INTERRUPTED


def test_what_kunit_said_in_the_log_of_a_boot_is_reported(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    # The kernel that there is has no KUnit: its log is written as KUnit writes it.
    pytester.makepyfile(
        r"""
        import pytest
        from pytest_chvm import InvalidConfigError, UnsupportedError

        LINES = ["KTAP version 1", "1..1", "    KTAP version 1", "    # Subtest: suite", "    1..2", "    ok 1 good",
                 "    # bad: EXPECTATION FAILED at lib/x.c:3", "    not ok 2 bad", "not ok 1 suite"]

        def test_kunit(chvm_vm, chvm_ktap):
            vm = chvm_vm(networks=[], cmdline_extra="printk.devkmsg=on")  # Or it takes ten lines at once only.
            with pytest.raises(UnsupportedError, match="it needs CONFIG_KUNIT=y"):
                chvm_ktap.kunit(vm)
            with pytest.raises(UnsupportedError, match="its kernel does not take"):
                chvm_ktap.kunit(vm, __file__)
            with pytest.raises(InvalidConfigError, match="there is no module 'none.ko'"):
                chvm_ktap.kunit(vm, "none.ko")
            for line in LINES:
                vm.write_text("/dev/kmsg", f"{line}\n")
            chvm_ktap.kunit(vm)
        """
    )
    result = run_pytest("-p", "no:subtests")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["1 of 2 tests failed:", "suite / bad", "*EXPECTATION FAILED at lib/x.c:3"])

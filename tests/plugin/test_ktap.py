"""Test programs in a guest: `chvm_ktap`."""

from __future__ import annotations

import pytest

from tests.runs import RunPytest

USES = r"""
    import pytest

    @pytest.fixture(scope="module")
    def vm(chvm_vm_factory):
        return chvm_vm_factory(networks=[])

    def ktap(*lines):
        return "printf '%s\\n' " + " ".join(f"'{line}'" for line in lines)

    def test_passes(vm, chvm_ktap):
        report = chvm_ktap(vm, ktap("TAP version 13", "1..2", "ok 1 first", "ok 2 # SKIP second"))
        assert report["first"].outcome == "passed"

    def test_fails(vm, chvm_ktap):
        chvm_ktap(vm, ktap("1..1", "  1..2", "  # it was 3", "  not ok 1 bad", "  ok 2 good", "not ok 1 suite"))

    def test_cut(vm, chvm_ktap):
        chvm_ktap(vm, ktap("1..2", "ok 1 first"))

    def test_status(vm, chvm_ktap):
        chvm_ktap(vm, ["sh", "-c", "echo ok 1 fine; echo a word >&2; exit 3"])

    def test_silent(vm, chvm_ktap):
        chvm_ktap(vm, "true")

    def test_skipped(vm, chvm_ktap):
        chvm_ktap(vm, ktap("1..0 # SKIP no such device"))

    def test_skips_itself(vm, chvm_ktap):
        chvm_ktap(vm, "echo needs hardware; exit 4")

    def test_hangs(vm, chvm_ktap):
        chvm_ktap(vm, ktap("1..2", "not ok 1 slow") + "; sleep 1000", timeout=1)

    def test_dies(chvm_vm, chvm_ktap):
        chvm_ktap(chvm_vm(), ktap("1..2", "ok 1 last words") + "; sleep 1; echo c >/proc/sysrq-trigger; sleep 100")
"""


@pytest.mark.skipif(pytest.version_tuple < (9,), reason="pytest has subtests from 9 on")
def test_each_result_of_a_program_is_a_subtest(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    pytester.makepyfile(USES)
    result = run_pytest("-v", "-rsuf")
    result.stdout.fnmatch_lines_random(
        [
            "*::test_passes SUBPASSED*first*",
            "*::test_passes SUBSKIPPED*second*",
            "*::test_passes PASSED*",
            "*::test_fails SUBFAILED*suite / bad*",
            "*it was 3",
            "*::test_fails SUBPASSED*suite / good*",
            "*::test_fails FAILED*",
            "1..2 was planned, and 1 result came: it was not finished",
            "the program ended with status 3, and no result says why",
            "a word",
            "it says nothing of any test: *",
            "*SKIPPED*no such device",
            "*SKIPPED*needs hardware",
            "*::test_hangs SUBFAILED*slow*",
            "*CommandTimeoutError: *did not end within 1 s, and was killed",
            "*::test_dies SUBPASSED*last words*",
            "*GuestPanicError: *",
        ]
    )
    names = [line.split(" ")[0].split("::")[1] for line in result.outlines if "::" in line and " FAILED" in line and "%]" in line]
    assert names == ["test_fails", "test_cut", "test_status", "test_silent", "test_hangs", "test_dies"]


def test_without_subtests_all_that_failed_are_one_failure(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    pytester.makepyfile(
        """
        def test_text(chvm_ktap):
            chvm_ktap.parse("1..3\\nok 1 a\\n# it was 3\\nnot ok 2 b\\nnot ok 3 c # TIMEOUT")
        """
    )
    result = run_pytest("-p", "no:subtests")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["2 of 3 tests failed:", "b", "  # it was 3", "c: it took too long"])

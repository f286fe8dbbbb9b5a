"""The memory of a failed test's VM among its artifacts, and what attaches a debugger in its report."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import RunPytest

FAILS = """
    def test_fails(chvm_vm):
        chvm_vm(vmm="qemu", network="none", gdb=True, name="mine")
        assert False

    def test_passes(chvm_vm):
        chvm_vm(vmm="qemu", network="none", name="other")
"""


def test_a_failed_test_s_memory_is_kept_where_asked_for_and_its_report_says_how_to_attach_gdb(
    pytester: pytest.Pytester, run_pytest: RunPytest
) -> None:
    pytester.makepyfile(FAILS)
    result = run_pytest("--chvm-keep=failed", "--chvm-core=failed", "--chvm-artifacts=kept")
    result.assert_outcomes(passed=1, failed=1)
    cores = list(Path("kept").glob("*/*.core"))
    assert [core.name for core in cores] == ["mine.core"]
    assert cores[0].read_bytes()[:4] == b"\x7fELF"
    result.stdout.fnmatch_lines(["*memory of VM mine*", "*mine.core"])
    result.stdout.fnmatch_lines(["*gdb of VM mine*", "gdb -ex 'target remote /*gdb.sock'*"])

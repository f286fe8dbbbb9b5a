"""`--chvm-kernel`: several kernels, what a test is called with each, and one that cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_chvm.base.cache import default_cache_dir
from pytest_chvm.errors import MissingRequirementError
from pytest_chvm.guest.kernels.package import package_of
from pytest_chvm.model import architecture
from tests.runs import RunPytest


@pytest.mark.slow
def test_two_packaged_kernels_are_a_matrix_of_which_a_part_can_be_selected(
    pytester: pytest.Pytester, run_pytest: RunPytest, guest_cache: Path
) -> None:
    words = ("debian:6.1-cloud", "debian:6.12-cloud")
    try:
        releases = [package_of(word, default_cache_dir(), print, architecture("x86_64")).release for word in words]
    except MissingRequirementError as error:
        pytest.skip(str(error))
    pytester.makepyfile(
        """
        def test_release(chvm_vm, request):
            vm = chvm_vm(network="none")
            assert request.node.callspec.id == vm.kernel.release
            assert vm.kernel.config["BPF_LSM"] == "y"
        """
    )
    result = run_pytest("-v", "-n", "2", *(f"--chvm-kernel={word}" for word in words))
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines_random([f"*PASSED *::test_release[[]{release}]*" for release in releases])
    result = pytester.runpytest_inprocess("--collect-only", "-q", "-k", "6.12", *(f"--chvm-kernel={word}" for word in words))
    result.stdout.fnmatch_lines([f"*::test_release[[]{releases[1]}]", "*1/2 tests collected (1 deselected)*"])


def test_a_kernel_that_cannot_be_had_is_an_error_before_any_test_or_a_skip(
    pytester: pytest.Pytester, user_environment: pytest.MonkeyPatch, fake_kernel: Path
) -> None:
    pytester.makepyfile("def test_vm(chvm_vm): chvm_vm()\ndef test_plain(): pass")
    user_environment.setenv("CHVM_KERNEL", "debian:2.4:/no/such/kernel")
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --chvm-kernel (CHVM_KERNEL, chvm_kernel): kernel 'debian:2.4': *"])
    result = pytester.runpytest_inprocess("-rs", "-v", "--chvm-missing=skip")
    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(
        [
            "*::test_vm[[]debian:2.4[]] SKIPPED*",
            "*::test_vm[[]kernel[]] SKIPPED*",
            "SKIPPED *no VM here: VM 'test-vm-debian-2.4': kernel 'debian:2.4': *",
            "SKIPPED *no VM here: VM 'test-vm-kernel': kernel '/no/such/kernel' does not exist*",
        ]
    )
    # What is wrong anywhere is no skip.
    corrupt = fake_kernel.with_name("corrupt")
    corrupt.write_bytes(b"#!/bin/sh\n" * 99)
    result = pytester.runpytest_inprocess("--chvm-missing=skip", f"--chvm-kernel={corrupt}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --chvm-kernel (*): kernel '{corrupt}' is not a kernel: expected a bzImage*"])

"""What a marker says of a test's kernel: `kernel_config` and `kernel_min`; and what a VM says of its kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import RunPytest

USES = """
    import pytest

    chvm = pytest.mark.chvm

    @chvm(kernel_config=["VIRTIO_BLK", "PREEMPT_RT=n"], kernel_min="4.0")
    def test_has(chvm_vm):
        kernel = chvm_vm(networks=[]).kernel
        assert kernel.config["CONFIG_VIRTIO_BLK"] in "ym"
        assert kernel.release[0].isdigit()
        assert kernel.version.startswith("#")

    @chvm(kernel_config=["VIRTIO_BLK=n", "NO_SUCH_OPTION"])
    def test_has_not(chvm_vm): raise AssertionError

    @chvm(kernel_min="99.5")
    def test_too_old(chvm_vm): raise AssertionError

    @chvm(kernel_min="99.5", inside=True)
    def test_too_old_inside(): raise AssertionError

    @chvm(kernel_config=["VIRTIO BLK"])
    def test_wrong(chvm_vm): raise AssertionError

    @chvm(kernel_mim="6.1")
    def test_misspelled(chvm_vm): chvm_vm()
"""


def test_a_test_whose_kernel_is_not_as_it_needs_is_skipped_with_the_reason(
    pytester: pytest.Pytester, run_pytest: RunPytest
) -> None:
    pytester.makepyfile(USES)
    result = run_pytest("-rs")
    result.assert_outcomes(passed=1, skipped=3, errors=1, failed=1)
    result.stdout.fnmatch_lines_random(
        [
            "SKIPPED*: the kernel has CONFIG_VIRTIO_BLK=[ym], no CONFIG_NO_SUCH_OPTION",
            "SKIPPED*: the kernel is [0-9]*, and 99.5 or newer is needed",
            "E *InvalidConfigError: kernel_config=*'VIRTIO BLK'*, expected a list like *",
            "E *InvalidConfigError: a VM has no argument 'kernel_mim'; *",
        ]
    )


def test_each_kernel_of_a_run_is_looked_at_and_one_that_nothing_is_known_of_is_an_error(
    pytester: pytest.Pytester, run_pytest: RunPytest, guest_kernel: Path
) -> None:
    for name, text in (("old", "# CONFIG_BPF_LSM is not set"), ("new", "CONFIG_BPF_LSM=y"), ("unknown", "")):
        boot = pytester.mkdir(name)
        boot.joinpath("vmlinux").symlink_to(guest_kernel)
        boot.joinpath(".config").write_text(text)
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.chvm(kernel_config=["BPF_LSM"])
        def test_lsm(chvm_kernel): pass
        """
    )
    kernels = [f"--chvm-kernel={name}/vmlinux" for name in ("old", "new", "unknown")]
    result = run_pytest("-v", "-rs", *kernels)
    result.stdout.fnmatch_lines_random(
        [
            "*::test_lsm[[]*old-vmlinux[]] SKIPPED *",
            "*::test_lsm[[]*new-vmlinux[]] PASSED *",
            "*::test_lsm[[]*unknown-vmlinux[]] ERROR *",
            "E *MissingRequirementError: *needs kernel_config=[[]'BPF_LSM'[]], and how the kernel *unknown/vmlinux' was configured is not*",
        ]
    )

"""Landlock with the real Cloud Hypervisor, in a lab whose kernel has enough of it."""

import subprocess
import sys

import pytest

from pytest_chvm.base.cache import default_cache_dir
from pytest_chvm.base.progress import show_progress
from pytest_chvm.guest.kernels.default import fetch_kernel_package
from pytest_chvm.guest.packages import PackageError
from pytest_chvm.host.kvm import why_no_kvm
from tests.relay import require_binary

# Debian 12's newer kernel; elsewhere the built-in guest's own has it, and tests/behaviour shows it.
PACKAGE = "linux-image-6.12-cloud-amd64"


# A guest within a machine, both emulated.
@pytest.mark.timeout(420)
@pytest.mark.skipif(why_no_kvm() is None, reason="KVM works here: tests/behaviour shows it")
def test_landlock_confines_the_real_one_in_a_lab_with_another_kernel():
    require_binary()
    try:
        # Not where the built-in guest's kernels are looked for.
        tree = fetch_kernel_package(PACKAGE, default_cache_dir() / "newer", show_progress)
    except PackageError as error:
        pytest.skip(f"no kernel with Landlock for the lab: {PACKAGE}: {error}")
    (kernel,) = (tree / "boot").glob("vmlinuz-*")
    command = [sys.executable, "-m", "pytest_chvm.cli", "lab", "--kernel", kernel, "--", sys.executable, "-m", "pytest"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-rA", "tests/behaviour/test_security.py", "-k", "landlock and cloud"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=400, check=False)
    assert "1 passed" in done.stdout, done.stdout[-8000:] + done.stderr[-2000:]

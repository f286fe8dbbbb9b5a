"""The events to which the VMM matters, with Cloud Hypervisor; and those that are done to a whole machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_chvm.host.keeper.remains import boot_id

ROOT = Path(__file__).parents[2]
LONGEST_RUN_S = 3600


@pytest.mark.skipif(shutil.which("cloud-hypervisor") is None, reason="Cloud Hypervisor is not installed")
@pytest.mark.timeout(LONGEST_RUN_S + 60)
def test_nothing_is_left_with_cloud_hypervisor(tmp_path: Path) -> None:
    # The boot id is of the machine that nothing of this may be done to. The lab also where KVM works: the clock of the machine is set back, and memory is taken away.
    lab = [sys.executable, "-m", "pytest_chvm.cli", "lab", "--force", "--memory-mb", "3072", "--"]
    inside = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--timeout=900", "tests/chaos/test_matrix.py"]
    environment = {**os.environ, "CHVM_CHAOS": "full", "CHVM_CHAOS_IN_LAB": boot_id()}
    output = tmp_path / "output.txt"
    with output.open("wb") as file:
        process = subprocess.Popen([*lab, *inside], cwd=ROOT, env=environment, stdout=file, stderr=file)
        try:
            status = process.wait(LONGEST_RUN_S)
        except subprocess.TimeoutExpired:
            process.terminate()
            status = process.wait()
    assert status == 0, output.read_text(errors="replace")

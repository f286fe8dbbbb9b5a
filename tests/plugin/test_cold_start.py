"""Workers that start at once with an empty cache: the guest is built by one of them, and all get it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORKERS = 8
BUILDS_GUEST = """
import sys
from pytest_chvm.machine.guest_choice import choose_guest
from pytest_chvm.model import VmConfig
from pytest_chvm.settings import Settings

settings = Settings.resolve()
print("here", flush=True)
sys.stdin.readline()
print(choose_guest(VmConfig(kernel=settings.kernel[0]), settings).config.initramfs)
"""


def test_eight_workers_starting_cold_build_the_guest_once(
    tmp_path: Path, user_environment: pytest.MonkeyPatch, guest_kernel: Path
) -> None:
    cache = tmp_path / "cache"
    user_environment.setenv("CHVM_CACHE_DIR", str(cache))
    user_environment.setenv("CHVM_KERNEL", str(guest_kernel))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([sys.executable, "-c", BUILDS_GUEST], **pipes) for _ in range(WORKERS)]
    for worker in workers:
        assert worker.stdout.readline() == "here\n"
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    said = [worker.communicate(timeout=240) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * WORKERS, said
    (guest,) = {Path(output.strip()) for output, _ in said}
    progress = "".join(errors for _, errors in said).splitlines()
    assert len(progress) == 1
    assert progress[0].startswith("pytest-chvm: building ")
    assert guest.read_bytes().startswith(b"070701")
    left = {path.name for path in guest.parent.parent.iterdir()}
    assert left == {guest.parent.name, f"{guest.parent.name}.lock"}

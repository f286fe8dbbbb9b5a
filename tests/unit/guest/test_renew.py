"""The program that renews clones is what its source says."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import pytest_chvm.guest
from pytest_chvm.guest import renew

SOURCE = Path(pytest_chvm.guest.__file__).with_name("renew.S")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the program is for x86-64")
@pytest.mark.skipif(not shutil.which("as") or not shutil.which("objcopy"), reason="binutils are missing")
def test_the_machine_code_is_the_assembled_source(tmp_path):
    subprocess.run(["as", "--64", "-o", tmp_path / "renew.o", SOURCE], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", tmp_path / "renew.o", tmp_path / "renew.bin"], check=True)
    assert (tmp_path / "renew.bin").read_bytes() == renew.CODE

"""The programs for the guest are what their sources say."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import pytest_chvm.guest
from pytest_chvm.guest import enter, renew, signals

SOURCES = Path(pytest_chvm.guest.__file__).parent


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the programs are for x86-64")
@pytest.mark.skipif(not shutil.which("as") or not shutil.which("objcopy"), reason="binutils are missing")
@pytest.mark.parametrize("program", [enter, renew, signals], ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_machine_code_is_the_assembled_source(program, tmp_path):
    source = SOURCES / f"{program.__name__.rpartition('.')[2]}.S"
    subprocess.run(["as", "--64", "-o", tmp_path / "program.o", source], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", tmp_path / "program.o", tmp_path / "program.bin"], check=True)
    assert (tmp_path / "program.bin").read_bytes() == program.CODE

"""What a type checker says of a user's code."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

import pytest_chvm
from pytest_chvm.model import CONFIG_FIELDS, LAUNCH_FIELDS, VmConfig
from pytest_chvm.model.arguments import ConfigArguments, VmArguments

RIGHT = """\
from pathlib import Path
from typing import assert_type
from pytest_chvm import CommandResult, SharedDir, Snapshot, Tap, Vm, VmConfig, VmFactory, launch

def test(chvm_vm: VmFactory) -> None:
    vm = chvm_vm(kernel="vmlinuz", shared_dirs={"code": "."}, cpus=2, boot="cold", networks=[Tap()], wait=False)
    assert_type(vm, Vm)
    assert_type(vm.run("true"), CommandResult)
    assert_type(vm.snapshot(), Snapshot)
    config = VmConfig(kernel="vmlinuz", root_disk=Path("disk"), shared_dirs=[SharedDir("code", ".", read_only=True)])
    assert_type(config.kernel, Path | None)
    assert_type(config.shared_dirs, tuple[SharedDir, ...])
    with launch(config, boot_timeout=5, memory_mb=512) as other:
        assert_type(other.check_output(["true"]), str)
"""
WRONG = {
    "chvm_vm(processors=2)": 'Unexpected keyword argument "processors"',
    "chvm_vm(cpu=2)": "incompatible type",
    'chvm_vm(cpus="2")': "incompatible type",
    'chvm_vm(boot="warm")': "incompatible type",
    "launch(VmConfig(kernel=3))": "incompatible type",
    'chvm_vm().check_output("true").returncode': 'has no attribute "returncode"',
}


@pytest.fixture(scope="module")
def said_by_mypy(tmp_path_factory):
    """What mypy says of right and of wrong code, by file and line."""
    place = tmp_path_factory.mktemp("types")
    (place / "right.py").write_text(RIGHT)
    head = "from pytest_chvm import VmConfig, VmFactory, launch\n\ndef test(chvm_vm: VmFactory) -> None:\n"
    (place / "wrong.py").write_text(head + "".join(f"    {line}\n" for line in WRONG))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", ".mypy_cache", place / "right.py", place / "wrong.py"],
        cwd=Path(pytest_chvm.__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert not done.stderr
    return done.stdout.splitlines()


def test_what_the_docs_show_passes(said_by_mypy):
    assert [line for line in said_by_mypy if "right.py" in line] == []


@pytest.mark.parametrize(("number", "code"), list(enumerate(WRONG, start=4)), ids=list(WRONG))
def test_a_wrong_argument_is_told(said_by_mypy, number, code):
    assert any(f"wrong.py:{number}: error:" in line and WRONG[code] in line for line in said_by_mypy), said_by_mypy


def test_the_typed_arguments_are_those_of_the_model():
    assert set(get_type_hints(ConfigArguments)) == set(CONFIG_FIELDS) == {field.name for field in fields(VmConfig)}
    assert set(get_type_hints(VmArguments)) == {*CONFIG_FIELDS, *LAUNCH_FIELDS} - {"wait"}


def test_the_stub_has_the_public_names():
    stub = Path(pytest_chvm.__file__).with_suffix(".pyi").read_text()
    imported = {line.rpartition(" as ")[2] for line in stub.splitlines() if line.startswith("from pytest_chvm.")}
    assert imported == set(pytest_chvm.__all__)

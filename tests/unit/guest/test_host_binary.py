"""What a program of the host's needs beside itself."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from pytest_chvm import InvalidConfigError
from pytest_chvm.guest.host_binary import host_binary


def test_a_program_has_the_libraries_that_it_loads_and_what_loads_them():
    binary = host_binary("ls")
    names = [library.name for library in binary.libraries]
    assert any(name.startswith("libc.") for name in names)
    assert any(name.startswith("ld-") for name in names)
    assert all(file.is_file() for file in binary.files.values())
    assert os.fspath(next(lib for lib in binary.libraries if lib.name.startswith("libc.")).parent) in binary.library_path.split(":")


def test_a_program_does_not_take_the_place_of_the_guests_own_commands(tmp_path):
    assert host_binary("ls").place == "/usr/local/bin/ls"
    own = shutil.copy(shutil.which("ls"), tmp_path / "ls")
    assert host_binary(own).place == os.fspath(own)


def test_a_link_is_followed_but_keeps_its_name(tmp_path):
    (tmp_path / "link").symlink_to(shutil.which("ls"))
    found = host_binary(tmp_path / "link")
    assert (found.place, found.file) == (os.fspath(tmp_path / "link"), Path(shutil.which("ls")).resolve())


def test_a_static_program_has_none():
    assert host_binary(shutil.which("busybox")).libraries == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "the host has no program '.*/program'"),
        (lambda path: path.write_text("#!/bin/sh\ntrue\n"), "is a script, which needs its interpreter"),
        (lambda path: path.write_text("nothing"), "is no ELF executable"),
        (lambda path: path.write_bytes(b"\x7fELF cut off"), "."),
    ],
)
def test_what_is_no_program_is_refused(tmp_path, make, message):
    make(tmp_path / "program")
    if (tmp_path / "program").exists():
        (tmp_path / "program").chmod(0o755)
    if message == ".":
        # What ldd says of it is nobody's business: it has no libraries then, and does not run.
        assert host_binary(tmp_path / "program").libraries == ()
        return
    with pytest.raises(InvalidConfigError, match=message):
        host_binary(tmp_path / "program")


def test_a_library_that_is_not_there_is_named(tmp_path, monkeypatch):
    ldd = tmp_path / "ldd"
    ldd.write_text("#!/bin/sh\nprintf '\\tlibodd.so.1 => not found\\n\\t/lib64/ld.so (0x00007f)\\n'\n")
    ldd.chmod(0o755)
    program = shutil.copy(sys.executable, tmp_path / "program")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(InvalidConfigError, match=r"does not have what '.*' loads: libodd.so.1"):
        host_binary(program)

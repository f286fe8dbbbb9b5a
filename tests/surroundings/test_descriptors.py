"""What a process has open: nothing more after a start that failed, and no more than there is with many VMs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_chvm import launch
from pytest_chvm.drivers.memory import COPY_NAME, copied_to_memory
from pytest_chvm.errors import VmError
from pytest_chvm.settings import Settings

BROKEN_VIRTIOFSD = """#!/bin/sh
[ "$1" = --version ] && echo "virtiofsd 1.13.0" && exit
exit 3
"""


def open_files() -> set[str]:
    """Return what this process has open: "0 /dev/null"."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name} {entry.readlink()}")
        except FileNotFoundError:
            # What it is listed by.
            continue
    return found


def guest_memories() -> set[str]:
    return {file for file in open_files() if COPY_NAME in file}


def test_memory_that_cannot_be_copied_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        copied_to_memory(tmp_path / "missing")
    assert guest_memories() == set()


def test_the_memory_of_a_clone_that_does_not_start_is_not_kept(tmp_path: Path) -> None:
    virtiofsd = tmp_path / "virtiofsd"
    virtiofsd.write_text(BROKEN_VIRTIOFSD)
    virtiofsd.chmod(0o755)
    settings = replace(Settings.resolve(), virtiofsd=virtiofsd)
    with pytest.raises(VmError, match="ended with status 3"):
        launch(vmm="qemu", boot="clone", network="none", shared_dirs={"code": tmp_path}, settings=settings)
    assert guest_memories() == set()
    assert not [file for file in open_files() if os.fspath(tmp_path) in file]


WITHOUT_INOTIFY = """
import pathlib, sys
pathlib.Path("/proc/sys/user/max_inotify_instances").write_text("0")
try:
    import inotify_simple
    inotify_simple.INotify()
except OSError as error:
    print(error.strerror, flush=True)
from pytest_chvm import launch
with launch(vmm="qemu", boot="cold", network="none", shared_dirs={"code": sys.argv[1]}) as vm:
    print(vm.check_output("ls /mnt/code"), flush=True)
"""


def test_vms_start_where_the_user_has_no_inotify_instance_left(tmp_path: Path, guest_cache: Path) -> None:
    (tmp_path / "file").touch()
    in_namespace = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", WITHOUT_INOTIFY, str(tmp_path)]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "CHVM_CACHE_DIR": str(guest_cache)}
    done = subprocess.run(in_namespace, capture_output=True, text=True, check=False, timeout=100, env=environment)
    assert done.stdout.split("\n")[:2] == ["Too many open files", "file"], done.stderr
    assert done.returncode == 0

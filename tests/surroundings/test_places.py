"""Homes, caches and lock directories as other machines have them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pytest_chvm import launch
from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.machine.guest_choice import cache_dir
from pytest_chvm.settings import Settings
from tests.leaks import Sandbox

WHERE = """
import os, sys
from pytest_chvm.errors import VmError
from pytest_chvm.base.cache import default_cache_dir
from pytest_chvm.host.directories import common_lock_dir

# Before the modules that are loaded late are needed, which this user may not read.
import pwd, encodings.idna
if sys.argv[2] != "0":
    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
try:
    print({"cache": default_cache_dir, "locks": common_lock_dir}[sys.argv[1]]())
except VmError as error:
    print(error)
"""
LARGE = ("templates", "snapshots", "digests")
# Of nobody, not even in /etc/passwd.
SOME_UID = "54321"


def where(what: str, uid: str, directory: Path, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if key not in ("HOME", "XDG_CACHE_HOME")}
    command = [sys.executable, "-c", WHERE, what, uid]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory, env={**kept, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that all users can reach and write in, as those of pytest are not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o777)
        yield Path(directory)


@pytest.mark.parametrize("home", [None, "", "/", "relative", "/root/none", "/proc/none"])
def test_who_has_no_home_that_can_be_written_has_a_cache_among_the_temporary_files(
    needs_root: None, open_directory: Path, home: str | None
) -> None:
    temporary = open_directory / "tmp"
    temporary.mkdir()
    temporary.chmod(0o1777)
    environment = {"TMPDIR": str(temporary), **({} if home is None else {"HOME": home})}
    found = where("cache", SOME_UID, open_directory, **environment)
    assert found == f"{temporary}/pytest-chvm-cache-{SOME_UID}"
    assert (temporary / f"pytest-chvm-cache-{SOME_UID}").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in open_directory.iterdir()] == ["tmp"]
    # Somebody else's is not taken: what is in it is run.
    os.chown(found, 54322, 54322)
    assert "is not a directory of yours alone" in where("cache", SOME_UID, open_directory, **environment)


@pytest.mark.parametrize("home", [None, "/", "relative"])
def test_a_user_who_is_known_has_the_home_that_is_known(needs_root: None, tmp_path: Path, home: str | None) -> None:
    assert where("cache", "0", tmp_path, **({} if home is None else {"HOME": home})) == "/root/.cache/pytest-chvm"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("home", [None, "relative"])
def test_a_tilde_without_a_home_is_refused(monkeypatch: pytest.MonkeyPatch, home: str | None) -> None:
    monkeypatch.setenv("HOME", home) if home else monkeypatch.delenv("HOME")
    text = "~/kernel" if home else "~nobody-of-that-name/kernel"
    with pytest.raises(InvalidConfigError, match="there is no home directory for '~'"):
        Settings.resolve({"kernel": [text]})


def test_a_cache_path_may_be_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guest_cache: Path) -> None:
    long = tmp_path / ("y" * 140) / ("z" * 140)
    # With the kernel and all.
    shutil.copytree(guest_cache, long, symlinks=True, ignore=lambda at, _names: LARGE if at == str(guest_cache) else ())
    monkeypatch.setenv("CHVM_CACHE_DIR", str(long))
    assert len(str(cache_dir(Settings.resolve()))) > 280
    with launch(vmm="qemu", boot="cold", network="none") as vm, vm.snapshot().clone() as clone:
        assert clone.check_output("echo clone") == "clone\n"


@pytest.fixture
def sandbox(sandbox: Sandbox) -> Iterator[Sandbox]:
    yield sandbox
    # Its /tmp is everybody's.
    with suppress(OSError):
        os.rmdir("/tmp/pytest-chvm")


@pytest.mark.parametrize(("mode", "place"), [("1777", "/run/lock"), ("0755", "/tmp")])
def test_root_and_users_lock_in_one_place(needs_root: None, sandbox: Sandbox, mode: str, place: str) -> None:
    sandbox.run("chmod", mode, "/run/lock")
    found = []
    for uid in ("0", SOME_UID):
        command = sandbox.command(sys.executable, "-c", WHERE, "locks", uid)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        found.append(done.stdout.strip())
    assert found == [f"{place}/pytest-chvm"] * 2


def test_a_lock_directory_whose_owner_could_take_locks_away_is_not_used(needs_root: None, sandbox: Sandbox) -> None:
    for owner, mode in ((54322, "0777"), (54322, "0755"), (0, "0777")):
        sandbox.run("mkdir", "-m", mode, "/run/lock/pytest-chvm")
        sandbox.run("chown", str(owner), "/run/lock/pytest-chvm")
        command = sandbox.command(sys.executable, "-c", WHERE, "locks", SOME_UID)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "/tmp/pytest-chvm"
        assert f"/run/lock/pytest-chvm is another user's (uid {owner}, mode {mode})" in done.stderr
        sandbox.run("rmdir", "/run/lock/pytest-chvm")

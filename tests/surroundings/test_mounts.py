"""Something is mounted where we remove what is ours: what is mounted there is somebody's, and is left."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_chvm.base.cache import built_once
from pytest_chvm.base.trees import remove_tree
from pytest_chvm.errors import HostError
from tests.leaks import Sandbox
from tests.runs import StartPytest

BINDS = """
    import os, pathlib, subprocess, threading

    def bind_below(directory):
        # Of the same file system: its device number tells nothing.
        theirs = pathlib.Path("/run/theirs")
        theirs.mkdir()
        (theirs / "precious").write_text("x")
        for place in ("bind", "deeper/bind"):
            (directory / place).mkdir(parents=True)
            subprocess.run(["mount", "--bind", theirs, directory / place], check=True)
        (directory / "file").touch()
        subprocess.run(["mount", "--bind", theirs / "precious", directory / "file"], check=True)

    def test_binds(chvm_vm):
        vm = chvm_vm(wait=False, boot="cold", networks=[])
        bind_below(vm.handle.run_dir)
        with open(os.environ["NEWS"], "w") as news:
            print(os.getpid(), vm.handle.run_dir, file=news)
        if WAITS:
            threading.Event().wait()
"""


def unmounted(sandbox: Sandbox, run_dir: str) -> None:
    for place in ("bind", "deeper/bind", "file"):
        sandbox.run("umount", f"{run_dir}/{place}")


def reap(sandbox: Sandbox) -> subprocess.CompletedProcess[str]:
    command = sandbox.command(sys.executable, "-m", "pytest_chvm.cli", "reap")
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("by", ["close", "keeper", "reap"])
def test_what_is_mounted_below_a_run_directory_is_left(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox, needs_root: None, by: str
) -> None:
    pytester.makepyfile(BINDS.replace("WAITS", str(by != "close")))
    run = start_pytest()
    pid, run_dir = run.news().split()
    if by == "close":
        assert run.wait() == 1, run.output
        assert f"{run_dir}/bind: Device or resource busy: it is a mount point" in run.output
        assert f"{run_dir}/file: Device or resource busy: it is a mount point" in run.output
    else:
        keepers = [str(other) for other, line in sandbox.processes().items() if "keeper.py" in line] if by == "reap" else []
        sandbox.run("kill", "-KILL", pid, *keepers)
        assert run.wait() == -signal.SIGKILL
        left = sandbox.left_behind()
        assert not left.pids
    reaped = reap(sandbox)
    assert f"{run_dir}/deeper/bind: Device or resource busy: it is a mount point" in reaped.stderr
    assert sandbox.path("/run/theirs/precious").read_text() == "x"
    # Once that is undone, nothing keeps the rest.
    unmounted(sandbox, run_dir)
    assert reap(sandbox).returncode == 0
    sandbox.run("rm", "-r", "/run/theirs")
    assert not sandbox.left_behind()


@pytest.fixture
def mounted(needs_root: None, tmp_path: Path) -> Path:
    """A directory that another is mounted on."""
    theirs, place = tmp_path / "theirs", tmp_path / "tree/a/mounted"
    theirs.mkdir()
    (theirs / "precious").write_text("x")
    place.mkdir(parents=True)
    subprocess.run(["mount", "--bind", theirs, place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)
    assert (theirs / "precious").read_text() == "x"


def test_a_tree_is_removed_but_for_what_is_mounted_in_it(mounted: Path) -> None:
    tree = mounted.parents[1]
    (tree / "a/b/c").mkdir(parents=True)
    (tree / "a/b/file").touch()
    (tree / "link").symlink_to(mounted)
    failures = remove_tree(tree)
    assert len(failures) == 1
    assert failures[0].startswith(f"{mounted}: Device or resource busy")
    assert [path.name for path in tree.rglob("*")] == ["a", "mounted", "precious"]
    assert remove_tree(mounted) == failures


def test_an_unfinished_build_that_something_is_mounted_in_is_said(mounted: Path) -> None:
    with pytest.raises(HostError, match=r"cannot be removed: .*mounted: Device or resource busy.* CHVM_CACHE_DIR"):
        built_once(mounted.parents[1], lambda directory: None, lambda target: False)


def test_a_tree_that_is_nested_beyond_all_limits_is_said(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", DEEP, tmp_path / "tree"], check=True)
    assert remove_tree(tmp_path / "tree") != []
    subprocess.run(["rm", "-r", tmp_path / "tree"], check=True)


DEEP = """
import os, sys
os.mkdir(sys.argv[1])
os.chdir(sys.argv[1])
for _ in range(3000):
    os.mkdir("d")
    os.chdir("d")
"""

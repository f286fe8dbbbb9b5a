"""Commands and files, with both VMMs' consoles."""

import os
import threading

import pytest

from pytest_chvm import CommandTimeoutError, GuestCommandError
from pytest_chvm.guest.channels.console.console import Console


def test_status_and_both_outputs_come_back_apart(vm):
    done = vm.run("echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_any_byte_passes_in_both_directions(vm):
    data = bytes(range(256)) * 4
    assert vm.run("cat", input=data).stdout_bytes == data


def test_megabytes_pass_in_both_directions(vm):
    data = os.urandom(2 << 20)
    assert vm.run("cat", input=data, timeout=120).stdout_bytes == data


def test_outputs_are_whole_however_slowly_they_are_read(vm, monkeypatch):
    fill = Console._fill

    def slow(console):
        threading.Event().wait(0.03)
        fill(console)

    monkeypatch.setattr(Console, "_fill", slow)
    assert vm.run("head -c 300000 /dev/zero | tr '\\0' x").stdout_bytes == b"x" * 300_000
    # Hundreds of small writes fill a console's buffers as large ones do.
    assert vm.run("yes | head -c 20000").stdout_bytes == b"y\n" * 10_000


def test_a_list_is_one_programs_arguments(vm):
    words = ["a b", "c'd", '"', "$HOME", "x\ny", "\\", "é"]
    assert vm.check_output(["printf", "%s|", *words]) == "".join(f"{word}|" for word in words)


def test_a_command_that_fails_shows_both_outputs(vm):
    with pytest.raises(GuestCommandError, match=r"(?s)returned 7.*stdout: said.*stderr: moaned") as caught:
        vm.check_output("echo said; echo moaned >&2; exit 7")
    assert (caught.value.returncode, caught.value.stdout, caught.value.stderr) == (7, "said\n", "moaned\n")


def test_a_timeout_kills_all_that_was_started_and_the_next_command_works(vm):
    with pytest.raises(CommandTimeoutError) as late:
        vm.run("echo begun; setsid sleep 997 & sleep 998", timeout=2)
    assert late.value.stdout == "begun\n"
    assert vm.run("ps | grep -c '[s]leep 99'").stdout == "0\n"


def test_a_directory_goes_in_and_comes_out_as_it_was(vm, tmp_path):
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "data").write_bytes(os.urandom(5000))
    (tree / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (tree / "run.sh").chmod(0o755)
    vm.put(tree, "/tmp/tree")
    assert vm.check_output("/tmp/tree/run.sh") == "ran\n"
    back = vm.get("/tmp/tree", tmp_path / "back")
    assert (back / "sub" / "data").read_bytes() == (tree / "sub" / "data").read_bytes()
    vm.run("rm -rf /tmp/tree")

"""A channel is added by a file of its own: the smallest one runs a VM's commands in a `sh` beside the test."""

import sys
from pathlib import Path

import pytest

from pytest_chvm import UnsupportedError
from pytest_chvm.guest import channels
from pytest_chvm.guest.kinds.built_in import BuiltInGuest

# Another one in each machine.
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CHANNEL = """
import shlex
import subprocess

from pytest_chvm.base.untouched import monotonic_s
from pytest_chvm.errors import CommandTimeoutError
from pytest_chvm.model import CommandResult


class LocalShell:
    is_connected = True

    def __init__(self, line):
        self.line = line

    def run(self, command, *, timeout, input):
        self.line.check_alive()
        started_s = monotonic_s()
        script = command if isinstance(command, str) else shlex.join(command)
        try:
            done = subprocess.run(["sh", "-c", script], input=input or b"", capture_output=True, timeout=timeout or None)
        except subprocess.TimeoutExpired as late:
            name = self.line.vm_name
            raise CommandTimeoutError(f"VM {name!r}: {command!r} was late", vm_name=name, stdout="", stderr="") from late
        return CommandResult(command, done.returncode, done.stdout, done.stderr, monotonic_s() - started_s)

    def tell(self, script, timeout):
        raise NotImplementedError

    def poke(self, script, timeout):
        return None

    def close(self):
        self.is_connected = False


def open_channel(line):
    return LocalShell(line)
"""


@pytest.fixture
def local_channel(tmp_path, monkeypatch):
    """Put the file where channels are found, and have the built-in guest use it."""
    directory = tmp_path / "channels"
    directory.mkdir()
    (directory / "local.py").write_text(CHANNEL)
    monkeypatch.setattr(channels, "__path__", [*channels.__path__, str(directory)])
    monkeypatch.setattr(BuiltInGuest, "channel", "local")
    yield
    del sys.modules[f"{channels.__name__}.local"]


@pytest.mark.usefixtures("local_channel")
def test_a_new_channel_is_a_file_and_runs_commands_and_moves_files(chvm_vm, tmp_path):
    vm = chvm_vm(boot="cold", network="none")
    done = vm.run("cat; echo oh >&2; exit 3", input="in")
    assert (done.returncode, done.stdout, done.stderr) == (3, "in", "oh\n")
    assert vm.check_output(["cat", str(BOOT_ID)]) == BOOT_ID.read_text()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(bytes(range(256)))
    vm.put(tmp_path / "tree", f"{tmp_path}/guest/tree")
    assert vm.get(f"{tmp_path}/guest/tree", tmp_path / "back") == tmp_path / "back"
    assert (tmp_path / "back" / "file").read_bytes() == bytes(range(256))
    assert [event.details["returncode"] for event in vm.events if event.kind == "command"] == [3, 0]
    with pytest.raises(UnsupportedError, match="cannot be saved"):
        vm.snapshot()

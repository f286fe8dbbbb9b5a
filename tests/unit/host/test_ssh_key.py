"""The key pair of a run."""

import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from pytest_chvm import HostError
from pytest_chvm.host.host import Host
from pytest_chvm.host.ssh_key import new_host_keys, run_key


@pytest.fixture
def host():
    host = Host()
    yield host
    assert host.close() == []


def test_a_run_has_one_key_pair_which_goes_with_it(host):
    with ThreadPoolExecutor() as pool:
        keys = set(pool.map(run_key, [host] * 4))
    [key] = keys
    assert key.public.startswith("ssh-ed25519 ")
    assert "\n" not in key.public
    assert stat.S_IMODE(key.private.stat().st_mode) == 0o600
    assert host.close() == []
    assert not key.private.exists()
    assert run_key(host).public != key.public


def test_what_an_interrupt_has_left_of_a_key_is_no_key(host):
    directory = host.keeper().directory
    (directory / "ssh_key.new").write_text("half")
    (directory / "ssh_key.pub").write_text("half")
    assert run_key(host).public.startswith("ssh-ed25519 ")


def test_a_key_that_cannot_be_made_is_an_error_in_words(host, monkeypatch, tmp_path):
    for name in ("ssh", "ssh-keygen"):
        (tmp_path / name).write_text("#!/bin/sh\necho no space left\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match=r"ssh-keygen made no key in .*: no space left"):
        run_key(host)


def test_host_keys_are_whole_and_others_each_time_and_nothing_is_left_of_them(tmp_path):
    keys = [key for _ in range(2) for key in new_host_keys(tmp_path, "web")]
    assert [key.type for key in keys] == ["ed25519", "ecdsa"] * 2
    assert len({key.public for key in keys}) == 4
    assert list(tmp_path.iterdir()) == []
    for key in keys:
        private = tmp_path / "private"
        private.touch(0o600)
        private.write_text(key.private)
        derived = subprocess.run(["ssh-keygen", "-y", "-f", private], capture_output=True, text=True, check=True).stdout.strip()
        assert derived == key.public
        assert key.public.endswith(" root@web")


def test_without_ssh_keygen_or_with_one_that_fails_there_are_no_host_keys(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert new_host_keys(tmp_path, "web") == []
    (tmp_path / "ssh-keygen").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "ssh-keygen").chmod(0o755)
    assert new_host_keys(tmp_path, "web") == []

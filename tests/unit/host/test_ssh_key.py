"""The key pair of a run."""

import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from pytest_chvm import HostError
from pytest_chvm.host.host import Host
from pytest_chvm.host.ssh_key import run_key


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

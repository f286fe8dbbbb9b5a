"""`vm.ssh_command`: a program's arguments that log into the guest."""

import pytest

from pytest_chvm import MissingRequirementError, UnsupportedError


def test_a_guest_without_an_sshd_cannot_be_logged_into_and_says_what_goes_without(vm):
    with pytest.raises(UnsupportedError, match=r"there is no sshd in the guest .* install openssh-server.* vm\.run, vm\.put"):
        vm.ssh_command("true")


def test_without_opensshs_client_the_error_says_what_to_install(vm, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    vm.machine.lease.keeper.directory.joinpath("ssh_key").unlink(missing_ok=True)
    with pytest.raises(MissingRequirementError, match=r"ssh and ssh-keygen not found on PATH: install .*openssh-client"):
        vm.ssh_command("true")

"""`vm.ssh_command`: a program's arguments that log into the guest."""

import os
import subprocess

import pytest

from pytest_chvm import MissingRequirementError, UnsupportedError
from pytest_chvm.machine.ssh_relay import ShellRelay

TIMEOUT_S = 120.0
# Whoever comes first boots the image, which takes a minute of an idle machine.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def debian(chvm_vm_factory, debian_image):
    """A stock image, which the tests of this module leave as it was. What is said over SSH is no VMM's affair: one does."""
    with chvm_vm_factory(vmm="qemu", name="debian", root_disk=debian_image, memory_mb=512, boot="clone", boot_timeout=500) as vm:
        yield vm


@pytest.fixture(scope="module")
def other(chvm_vm_factory, debian_image):
    """Another clone of the same image, which was not logged into yet."""
    with chvm_vm_factory(vmm="qemu", name="other", root_disk=debian_image, memory_mb=512, boot="clone", boot_timeout=500) as vm:
        yield vm


def told(command, data="", **options):
    return subprocess.run(command, input=data, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, **options)


def test_a_stock_image_is_logged_into_as_root_and_nothing_of_the_users_is_touched(debian, tmp_path):
    command = debian.ssh_command("id -un; hostname; cat; exit 3")
    assert all(isinstance(word, str) for word in command)
    # No agent's keys, no configuration, no questions.
    environment = {"PATH": os.environ["PATH"], "SSH_AUTH_SOCK": str(tmp_path / "nobody"), "HOME": str(tmp_path)}
    done = told(command, "from the host", env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (3, "root\ndebian\nfrom the host", "")
    assert list(tmp_path.iterdir()) == []


def test_several_arguments_are_one_programs_and_options_are_sshs(debian):
    assert told(debian.ssh_command("printf", "%s,", "a  b", "$HOME", "it's")).stdout == "a  b,$HOME,it's,"
    done = told(debian.ssh_command("-v", "true"))
    assert done.returncode == 0
    assert "Host 'debian' is known and matches" in done.stderr
    assert told(debian.ssh_command(), "echo typed").stdout.endswith("typed\n")


def test_without_a_network_each_connection_has_an_sshd_of_its_own(debian):
    relay = ShellRelay(debian.machine)
    try:
        host, port = relay.address
        command = debian.ssh_command("echo $SSH_CONNECTION; cat")
        command[command.index("-p") + 1] = str(port)
        command[command.index(next(word for word in command if word.startswith("root@")))] = f"root@{host}"
        # More than the guest's pipe holds.
        data = "x" * 100_000
        done = told(command, data)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"UNKNOWN 65535 UNKNOWN 65535\n{data}"
    finally:
        relay.close()
    assert told(command).returncode == 255


def test_a_guest_that_says_another_host_key_is_not_talked_to(debian):
    command = debian.ssh_command("true")
    known_hosts = debian.machine.lease.directory / "known_hosts"
    was = known_hosts.read_text()
    other = debian.machine.lease.keeper.directory / "ssh_key.pub"
    known_hosts.write_text(f"debian {other.read_text()}")
    done = told(command)
    known_hosts.write_text(was)
    assert done.returncode == 255
    assert "Host key verification failed" in done.stderr


def test_an_sshd_that_lets_root_in_by_no_key_or_does_not_run_is_an_error_that_says_so(other):
    other.check_output("echo PermitRootLogin no >/etc/ssh/sshd_config.d/closed.conf")
    with pytest.raises(UnsupportedError, match="has 'permitrootlogin no', and root is to log in by a key"):
        other.ssh_command("true")
    other.check_output("rm /etc/ssh/sshd_config.d/closed.conf; systemctl stop ssh")
    with pytest.raises(UnsupportedError, match=r"nothing listens at its port 22: start it, by vm\.run\('systemctl start ssh'\)"):
        other.ssh_command("true")
    other.check_output("systemctl start ssh")


def test_clones_have_host_keys_of_their_own(debian, other):
    assert [told(vm.ssh_command("hostname")).stdout for vm in (debian, other)] == ["debian\n", "other\n"]
    assert not keys_of(other) & keys_of(debian)


def keys_of(vm):
    return {line.split()[2] for line in (vm.machine.lease.directory / "known_hosts").read_text().splitlines()}


def test_a_guest_without_an_sshd_cannot_be_logged_into_and_says_what_goes_without(vm):
    with pytest.raises(UnsupportedError, match=r"there is no sshd in the guest .* install openssh-server.* vm\.run, vm\.put"):
        vm.ssh_command("true")


def test_without_opensshs_client_the_error_says_what_to_install(vm, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    vm.machine.lease.keeper.directory.joinpath("ssh_key").unlink(missing_ok=True)
    with pytest.raises(MissingRequirementError, match=r"ssh and ssh-keygen not found on PATH: install .*openssh-client"):
        vm.ssh_command("true")

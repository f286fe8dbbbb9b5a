"""Programs of the host's in the guest, with the libraries that they load."""

import shutil

import pytest

from pytest_chvm import InvalidConfigError


def test_a_program_of_the_hosts_runs_in_the_built_in_guest(vm):
    told = vm.run_host_binary(["cat", "/proc/version", "-"], input="and more\n")
    assert told.returncode == 0, told.stderr
    assert told.stdout == vm.check_output("cat /proc/version") + "and more\n"
    # BusyBox's own are what they were.
    assert "BusyBox" in vm.run("cat --help").stderr


def test_its_arguments_environment_and_directory_are_as_of_run(vm, tmp_path):
    program = shutil.copy(shutil.which("printenv"), tmp_path / "tell")
    told = vm.run_host_binary([program, "GREETING"], env={"GREETING": "hello"}, cwd="/tmp")
    assert (told.returncode, told.stdout) == (0, "hello\n")
    assert vm.run_host_binary([program, "NONE"]).returncode == 1
    # Another file of that name is another program.
    shutil.copy(shutil.which("ls"), program)
    assert vm.run_host_binary([program, "/lib/chvm/configure.sh"]).stdout == "/lib/chvm/configure.sh\n"
    assert vm.check_output("ls -ld /tmp").startswith("drwxrwxrwt")


@pytest.mark.parametrize("command", ["ls -l", [], ["/no/such/program"]])
def test_what_is_no_program_is_refused(vm, command):
    with pytest.raises(InvalidConfigError, match=r"expected a list|the host has no program"):
        vm.run_host_binary(command)

"""`vm.testinfra`: assertions about a guest in pytest-testinfra's words, over the VM's own shell."""

import sys

import pytest

from pytest_chvm import CommandTimeoutError, MissingRequirementError


def test_files_users_and_sockets_of_a_vm_without_a_network_read_like_english(boot):
    vm = boot(network="none")
    host = vm.testinfra
    passwd = host.file("/etc/passwd")
    assert passwd.exists
    assert passwd.is_file
    assert (passwd.user, passwd.mode) == ("root", 0o644)
    assert passwd.contains("^root:")
    assert not host.file("/etc/shadowy").exists
    assert host.user("root").uid == 0
    vm.check_output("nc -l -p 77 </dev/null >/dev/null 2>&1 &")
    vm.check_output("until netstat -ltn | grep -q :77; do usleep 10000; done")
    assert host.socket("tcp://0.0.0.0:77").is_listening
    assert not host.socket("tcp://0.0.0.0:78").is_listening


def test_commands_give_status_and_both_outputs(vm):
    host = vm.testinfra
    done = host.run("echo out; echo %s >&2; exit 3", "it's $HOME")
    assert (done.rc, done.stdout, done.stderr) == (3, "out\n", "it's $HOME\n")
    assert host.check_output("echo %s", "a  b") == "a  b"
    assert host.exists("sh")
    with pytest.raises(AssertionError, match="Unexpected exit code 1"):
        host.check_output("false")
    with pytest.raises(CommandTimeoutError, match="sleep 100"):
        host.run("sleep 100", timeout=0.5)
    assert host is vm.testinfra


@pytest.mark.parametrize("name", ["a b", "it's $HOME", "%s %d", "-n", "two\nlines", "é", "\udcff"], ids=ascii)
def test_paths_may_have_any_characters(vm, name):
    path = f"/tmp/{name}"
    vm.check_output(["cp", "/etc/passwd", path])
    file = vm.testinfra.file(path)
    assert file.is_file
    assert file.content_string.startswith("root:")
    vm.check_output(["rm", path])
    assert not file.exists


def test_contents_that_are_no_utf8_come_as_they_are(vm):
    vm.check_output("printf 'caf\\351' >/tmp/latin")
    assert vm.testinfra.file("/tmp/latin").content == b"caf\xe9"
    assert vm.testinfra.file("/tmp/latin").content_string == "caf\udce9"


@pytest.mark.timeout(900)
def test_services_and_packages_of_a_stock_image_read_like_english(chvm_vm, debian_image):
    # The same clone as in the tests of SSH. No VMM's affair: one does.
    host = chvm_vm(vmm="qemu", name="debian", root_disk=debian_image, memory_mb=512, boot="clone", boot_timeout=500).testinfra
    assert host.system_info.distribution == "debian"
    assert host.package("openssh-server").is_installed
    assert not host.package("nginx").is_installed
    assert host.service("ssh").is_running
    assert host.service("ssh").is_enabled
    assert host.socket("tcp://22").is_listening
    assert host.file("/etc").is_directory
    assert "ssh" in host.file("/etc").listdir()


def test_without_pytest_testinfra_the_error_says_what_to_install(vm, monkeypatch):
    monkeypatch.delitem(vm.__dict__, "testinfra", raising=False)
    monkeypatch.setitem(sys.modules, "testinfra.host", None)
    with pytest.raises(MissingRequirementError, match=r"pip install 'pytest-chvm\[testinfra\]'"):
        _ = vm.testinfra

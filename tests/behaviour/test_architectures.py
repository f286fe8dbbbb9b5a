"""arch="aarch64": a guest of another processor architecture than this machine's, emulated."""

import platform
import subprocess

import pytest

from pytest_chvm import InvalidConfigError, MissingRequirementError, Settings, SharedDir, UnsupportedError, VmConfig
from pytest_chvm.machine.guest_choice import built_in_kernel, choose_guest
from pytest_chvm.machine.plan import driver_for
from pytest_chvm.model import architecture

OTHER = "x86_64" if platform.machine() == "aarch64" else "aarch64"
# Of what takes tens of seconds on a busy machine in software.
BOOT_TIMEOUT_S = 180


@pytest.fixture(scope="module", autouse=True)
def other_machine():
    """What a machine of the other architecture needs."""
    try:
        driver_for(Settings.resolve(), arch=architecture(OTHER)).binary()
        built_in_kernel(Settings.resolve(), arch=architecture(OTHER))
    except MissingRequirementError as error:
        pytest.skip(f"no {OTHER} guest here: {error}")


@pytest.fixture(scope="module")
def vm(chvm_vm_factory):
    """A clone, which its tests leave as it was; with room for devices, as the other ones' template has it."""
    with chvm_vm_factory(arch=OTHER, boot="clone", boot_timeout=BOOT_TIMEOUT_S, name="foreign", hotplug=True) as machine:
        yield machine


def test_the_built_in_guest_runs_on_another_architecture(vm):
    assert vm.run("uname -m").stdout == f"{OTHER}\n"
    assert vm.kernel.release.endswith("-arm64" if OTHER == "aarch64" else "-amd64")
    # It has the tools that it has elsewhere too, and its address.
    assert "ext4" in vm.check_output("cat /proc/filesystems; type mount umount insmod tar vi")
    if vm.config.networks != ():
        assert vm.ip in vm.check_output("ip addr show dev eth0")


def test_files_and_processes_are_those_of_any_guest(vm, tmp_path):
    # More than the console is used for, so that the program that carries it is.
    data = bytes(range(256)) * 8192
    (tmp_path / "there").write_bytes(data)
    vm.put(tmp_path / "there", "/tmp/data")
    vm.get("/tmp/data", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    with vm.popen("trap 'echo interrupted; exit 3' INT; echo waits; while :; do sleep 0.1; done") as process:
        assert next(iter(process.stdout)) == "waits\n"
        process.send_signal(2)
        assert process.wait(60) == 3
        assert list(process.stdout) == ["interrupted\n"]


def test_clones_are_machines_of_their_own(vm, chvm_vm, tmp_path):
    (tmp_path / "file").write_text("shared")
    share = SharedDir("work", tmp_path)
    other = chvm_vm(arch=OTHER, boot="clone", boot_timeout=BOOT_TIMEOUT_S, shared_dirs=[share])
    assert other.read_text("/mnt/work/file") == "shared"
    facts = "cat /etc/machine-id; hostname; head -c 32 /dev/urandom | od -An -tx8; ip -o link show dev eth0 | grep -o 'ether .*'"
    here, there = (each.check_output(facts).splitlines() for each in (vm, other))
    assert not set(here) & set(there)
    # The clock is the host's, although the template's stood still.
    assert abs(int(other.check_output("date +%s")) - int(subprocess.check_output(["date", "+%s"]))) < 60


def test_a_kernel_of_another_architecture_is_refused(guest):
    for arch, kernel, known in (
        (OTHER, guest.kernel, platform.machine()),
        (None, built_in_kernel(Settings.resolve(), arch=architecture(OTHER)).image, OTHER),
    ):
        with pytest.raises(InvalidConfigError, match=f"for {known}, and .* is {arch or platform.machine()}: .* arch={known!r}"):
            choose_guest(VmConfig(arch=arch, kernel=kernel), Settings.resolve())


def test_programs_of_the_host_s_are_refused(vm):
    with pytest.raises(UnsupportedError, match=f"is {OTHER}, and '/.*' is for this machine, {platform.machine()}"):
        vm.run_host_binary(["true"])

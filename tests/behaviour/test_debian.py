"""Debian as `chvm guest build debian` makes it: a whole system with systemd, cloud-init and an SSH server, on both VMMs."""

import os
import signal
import subprocess

import pytest

from pytest_chvm import CommandTimeoutError, GuestCommandError, MissingRequirementError, Settings, launch
from pytest_chvm.base.progress import show_progress
from pytest_chvm.guest.builders.debian import DebianRecipe, build_debian
from pytest_chvm.machine.guest_choice import cache_dir
from tests.relay import CLOUD_HYPERVISOR

# Of an emulated processor, which in the lab is emulated by one that is itself emulated.
BOOT_TIMEOUT_S = 600
pytestmark = [pytest.mark.slow, pytest.mark.timeout(BOOT_TIMEOUT_S + 300)]
TOLD = {"write_files": [{"path": "/etc/motd", "content": "told by cloud-init\n"}], "runcmd": ["echo ran >/root/ran"]}
# What cloud-init leaves when it could not do something.
RESULT = '{"v1": {"datasource": null, "errors": ["(\\"runcmd\\", ValueError())"]}}'


@pytest.fixture(scope="module")
def debian(vmm):
    """The image, which set-up has built."""
    try:
        return build_debian(DebianRecipe(), cache_dir(Settings.resolve()), show_progress)
    except MissingRequirementError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def vm(vmm, debian, tmp_path_factory):
    """A VM that the tests share: of the image alone, or where that takes no minutes told something by a seed too.

    Not by the fixture: its boots end before the time limit of any test, and these have one of their own.
    """
    more = {} if vmm == CLOUD_HYPERVISOR else {"user_data": TOLD, "meta_data": {"instance-id": "one"}}
    log = tmp_path_factory.mktemp("debian") / "serial.log"
    asked = {"root_disk": debian, "memory_mb": 512, "boot_timeout": BOOT_TIMEOUT_S, "name": "deb", "serial_log": log, **more}
    with launch(vmm=vmm, boot="cold", **asked) as vm:
        # The connection to its console is made once, and is not the first test's to have left.
        vm.check_output("true")
        yield vm


def test_a_whole_system_is_up_when_it_is_ready(vm):
    assert vm.check_output("systemctl is-system-running --wait") == "running\n"
    assert vm.check_output("hostname; cat /etc/debian_version").splitlines()[0] == "deb"
    assert f" {vm.ip}/" in vm.check_output("ip -4 -o addr")
    assert subprocess.run(vm.ssh_command("cat /etc/hostname"), capture_output=True, timeout=120).returncode == 0


def test_units_are_waited_for_and_a_failed_one_shows_its_journal(vm):
    vm.wait_for_unit("ssh", timeout=120)
    vm.wait_for_port(22, timeout=120)
    units = "/run/systemd/system"
    vm.write_text(f"{units}/late.service", "[Service]\nType=oneshot\nExecStart=/bin/sleep 1\n")
    vm.write_text(f"{units}/bad.service", "[Service]\nExecStart=/bin/sh -c 'echo this is why; exit 3'\n")
    vm.check_output("systemctl daemon-reload; systemctl start --no-block late", timeout=300)
    vm.wait_for_unit("late", timeout=120)
    vm.run("systemctl start bad", timeout=300)
    with pytest.raises(GuestCommandError, match=r"(?s)the unit 'bad' has failed.*exit-code.*this is why"):
        vm.wait_for_unit("bad", timeout=120)
    with pytest.raises(GuestCommandError, match="'nope' is not known"):
        vm.wait_for_unit("nope", timeout=120)
    with pytest.raises(CommandTimeoutError, match=r"(?s)'rescue' is not active after 1 s.*inactive"):
        vm.wait_for_unit("rescue", timeout=1)
    vm.check_output("systemctl reset-failed bad", timeout=300)


def test_a_user_has_all_groups_and_a_process_hears_of_ctrl_c(vm):
    vm.check_output("useradd --create-home --groups adm carla", timeout=300)
    assert vm.check_output("id -nG; pwd; echo $HOME", user="carla", cwd="/srv", timeout=300).split() == [
        "carla",
        "adm",
        "/srv",
        "/home/carla",
    ]
    with vm.popen("trap 'echo caught; exit 5' INT; echo up; while :; do sleep 0.1; done", user="carla") as process:
        assert process.stdout.readline(300) == "up\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read(300).endswith("caught\n")
        assert process.wait(300) == 5


def test_attributes_go_both_ways(vm, tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name, data in (("small", b"x"), ("large", os.urandom(2 << 20)), ("empty", b"")):
        (tree / name).write_bytes(data)
        try:
            os.setxattr(tree / name, "user.note", b"of " + name.encode() + b"\xff\n")
        except OSError as error:
            pytest.skip(f"no extended attributes here: {error}")
    vm.put(tree, "/root/tree", xattrs=True)
    back = vm.get("/root/tree", tmp_path / "back", xattrs=True)
    for name in ("small", "large", "empty"):
        assert (back / name).read_bytes() == (tree / name).read_bytes()
        assert os.getxattr(back / name, "user.note") == b"of " + name.encode() + b"\xff\n"


def test_cloud_init_has_done_all_when_it_is_ready(vm, vmm):
    if vmm == CLOUD_HYPERVISOR:
        pytest.skip("without a seed cloud-init has nothing to do; with one it takes minutes in the lab")
    assert vm.check_output("cat /etc/motd /root/ran") == "told by cloud-init\nran\n"
    assert "status: done" in vm.check_output("cloud-init status")
    assert vm.check_output("cat /var/lib/cloud/data/instance-id") == "one\n"
    assert "pytest-chvm" in vm.check_output("cat /home/debian/.ssh/authorized_keys")


def test_what_cloud_init_could_not_do_is_on_the_console(vm, vmm):
    if vmm == CLOUD_HYPERVISOR:
        pytest.skip("without a seed it does nothing")
    vm.write_text("/run/cloud-init/result.json", RESULT)
    vm.check_output("sh /run/chvm/stock.sh ready", timeout=120)
    said = vm.wait_for_console(r"chvm: cloud-init status:\r?\nstatus: [^$]*failed=([a-z-]+)", timeout=60)
    assert said[1] == "cloud-init"

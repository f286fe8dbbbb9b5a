"""Root that is none: of a user namespace, of a container, without capabilities."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pytest_chvm.host.virtiofsd import NEEDED_AS_ROOT

SAYS = """
import sys
from pytest_chvm import Settings, launch
from pytest_chvm.machine.plan import driver_for
from pytest_chvm.machine.nics import network_mode
settings = Settings.resolve().with_arguments({"vmm": "qemu"})
print(*network_mode(settings, driver_for(settings)), sep=": ")
with launch(vmm="qemu") as vm:
    assert vm.check_output("echo hi") == "hi\\n"
    print(type(vm.config.networks[0]).__name__)
"""
SHARED = """
import sys
from pytest_chvm import launch
with launch(vmm="qemu", shared_dirs={"a": sys.argv[1]}) as vm:
    vm.check_output("echo hi >/mnt/a/written")
"""
SHARE = """
import sys
from pytest_chvm import launch, MissingRequirementError
try:
    launch(vmm="qemu", shared_dirs={"a": sys.argv[1]})
except MissingRequirementError as error:
    print(error)
"""


def run(wrapper, code, *arguments):
    command = [*wrapper, sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def needs_user_namespaces():
    done = subprocess.run(["unshare", "-Ur", "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no user namespace can be made here: {done.stderr}")


@pytest.fixture
def needs_tun():
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("/dev/net/tun may not be opened")


def test_root_of_a_user_namespace_gets_user_mode_and_the_reason(needs_user_namespaces, needs_tun):
    said = run(["unshare", "-Ur"], SAYS)
    assert said.startswith("user: no TAP can be made: ")
    assert "Operation not permitted (as root of a user namespace" in said
    assert said.endswith("UserNetwork\n")


def test_root_of_a_user_namespace_with_a_network_of_its_own_gets_taps(needs_user_namespaces, needs_tun):
    assert run(["unshare", "-Urn"], SAYS) == "tap: TAPs can be made here\nTap\n"


def test_root_without_capabilities_gets_user_mode(needs_root):
    said = run(["setpriv", "--bounding-set=-all", "--inh-caps=-all"], SAYS)
    assert said == "user: no TAP can be made: there is no CAP_NET_ADMIN\nUserNetwork\n"


def test_root_of_a_user_namespace_shares(needs_user_namespaces, tmp_path):
    run(["unshare", "-Ur"], SHARED, str(tmp_path))
    assert (tmp_path / "written").read_text() == "hi\n"


def test_root_with_the_rights_of_a_container_shares(needs_root, tmp_path):
    kept = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in NEEDED_AS_ROOT)
    run(["setpriv", f"--bounding-set=-all,{kept}", "--inh-caps=-all"], SHARED, str(tmp_path))
    assert (tmp_path / "written").read_text() == "hi\n"


def test_root_without_capabilities_is_told_that_it_has_no_shares(needs_root, tmp_path):
    said = run(["setpriv", "--bounding-set=-all", "--inh-caps=-all"], SHARE, str(tmp_path))
    assert "CAP_SYS_CHROOT" in said

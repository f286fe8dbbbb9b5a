"""Root that is none: of a user namespace, of a container, without capabilities."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import pytest_chvm
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
# As an ordinary user for whom nothing is in the way to where the tests are; what else is in those directories they do not see.
AS_USER = """
work=$1 uid=$2 closed=$3
shift 3
while [ "$1" != -- ]; do
    needed="$needed $1"
    shift
done
shift
mkdir $work/kept && mount --rbind "$closed" $work/kept && mount -t tmpfs -o mode=0755 open "$closed" || exit
for path in $needed; do mkdir -p $closed$path && mount --rbind $work/kept$path $closed$path || exit; done
umount -l $work/kept
exec setpriv --reuid $uid --regid $uid --clear-groups env -u XDG_RUNTIME_DIR HOME=$work/home CHVM_CACHE_DIR=$work/cache "$@"
"""
HOST_ROOT = """
import os, sys
from pytest_chvm import SharedDir, launch
home = os.environ["HOME"]
with launch(vmm="qemu", boot="cold", root="host", shared_dirs=[SharedDir("kept", f"{home}/kept", mount="/srv/kept")]) as vm:
    print(vm.check_output([sys.executable, "-c", "import os; print(os.getuid(), os.environ['HOME'])"]), end="")
    print(vm.check_output("cat ~/file ~/.ssh/key 2>/dev/null || cat /etc/shadow | wc -c"), end="")
    vm.check_output("echo written >/srv/kept/file; echo changed >~/file; mkdir /there && mount -t tmpfs there /there")
"""
HOST_ROOT_REFUSED = """
from pytest_chvm import HostRoot, MissingRequirementError, launch
try:
    launch(vmm="qemu", root="host")
except MissingRequirementError as error:
    print(error)
with launch(vmm="qemu", boot="cold", root=HostRoot(hidden=[])) as vm:
    vm.check_output("test -s /etc/shadow")
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


@pytest.fixture
def as_user(needs_root, needs_user_namespaces, guest_cache):
    """What runs a program as an ordinary user, of whom a home and a cache are."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        work, uid = Path(directory), 54321
        work.chmod(0o755)
        (work / "home/.ssh").mkdir(parents=True)
        (work / "home/kept").mkdir()
        (work / "home/file").write_text("the user's\n")
        (work / "home/.ssh/key").write_text("secret\n")
        for name in ("packages", "vmlinux"):
            if (guest_cache / name).exists():
                shutil.copytree(guest_cache / name, work / "cache" / name, symlinks=True)
        subprocess.run(["chown", "-R", f"{uid}:{uid}", work / "home", work / "cache"], check=True)
        # The project and the interpreter may be in the home of root.
        needed = {
            sys.prefix,
            sys.base_prefix,
            str(Path(pytest_chvm.__file__).parents[1]),
            os.path.dirname(shutil.which("virtiofsd")),
        }
        inside = [path.removeprefix("/root") for path in sorted(needed) if path.startswith("/root/")]
        yield work, ["unshare", "--mount", "sh", "-c", AS_USER, "sh", str(work), str(uid), "/root", *inside, "--"]


def test_an_ordinary_users_guest_sees_what_the_user_may_read(as_user):
    work, wrapper = as_user
    assert run(wrapper, HOST_ROOT) == f"0 {work}/home\nthe user's\n0\n"
    assert (work / "home/kept/file").read_text() == "written\n"
    assert (work / "home/file").read_text() == "the user's\n"


def test_where_nothing_can_be_hidden_the_hosts_root_is_refused(needs_root):
    kept = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in NEEDED_AS_ROOT)
    said = run(["setpriv", f"--bounding-set=-all,{kept}", "--inh-caps=-all"], HOST_ROOT_REFUSED)
    assert "nothing of '/' can be hidden from the guest" in said
    assert "HostRoot(hidden=[])" in said

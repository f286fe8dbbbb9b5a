"""The host's file system as the guest's: the same programs at the same paths, read-only below, without the host's secrets."""

import os
import shutil
import sys
from pathlib import Path

import iniconfig
import pytest

from pytest_chvm import HostRoot, InvalidConfigError, SharedDir, UnsupportedError


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A directory of the host's that the guest may write to."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def vm(chvm_vm_factory, vmm, kept):
    """A guest that has the host's root, which the tests of this file share."""
    shared = [SharedDir("kept", kept, mount="/srv/a place"), SharedDir("seen", kept, read_only=True)]
    with chvm_vm_factory(vmm=vmm, root="host", shared_dirs=shared, name=f"host-root-{vmm}") as machine:
        yield machine


@pytest.fixture(scope="module")
def on_qemu(chvm_vm_factory):
    """Another, for what has nothing to do with the VMM."""
    with chvm_vm_factory(vmm="qemu", root="host", name="host-root") as machine:
        yield machine


def test_the_same_python_runs_in_the_tests_directory(vm):
    done = vm.run(
        [sys.executable, "-c", "import iniconfig, os, sys; print(os.getcwd(), os.getuid(), iniconfig.__file__, sys.prefix)"]
    )
    assert done.stderr == ""
    assert done.stdout.split() == [os.getcwd(), "0", iniconfig.__file__, sys.prefix]
    assert done.command[0] == sys.executable


def test_programs_are_found_where_the_test_finds_them(on_qemu):
    assert on_qemu.check_output("echo $PATH") == os.environ["PATH"] + "\n"


def test_what_the_guest_writes_goes_with_it(on_qemu, tmp_path):
    (tmp_path / "there").write_text("of the host's")
    (tmp_path / "directory/in it").mkdir(parents=True)
    on_qemu.check_output(f"cd {tmp_path} && echo >made && echo more >>there && rm -r directory && echo >/usr/bin/mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "there"]
    assert (tmp_path / "there").read_text() == "of the host's"
    assert (tmp_path / "directory/in it").is_dir()
    assert not os.path.exists("/usr/bin/mine")


def test_the_hosts_files_cannot_be_written_below_the_layer_either(vm, tmp_path):
    """As root of the guest, with the file system mounted anew: virtiofsd refuses; nor are secrets there."""
    said = vm.run(f"mkdir /lower && mount -t virtiofs -o rw chvm-root /lower && cat /lower/etc/shadow; echo >/lower{tmp_path}/made")
    assert said.stdout == ""
    assert said.returncode != 0
    assert "Read-only" in said.stderr
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("secret", ["/etc/shadow", "/etc/gshadow"])
def test_secrets_are_empty(on_qemu, secret):
    assert os.path.getsize(secret)
    assert on_qemu.check_output(f"cat {secret}") == ""


def test_shared_dirs_are_where_they_were_asked_for(vm, kept):
    vm.check_output("echo written >'/srv/a place/file'")
    assert (kept / "file").read_text() == "written\n"
    assert vm.check_output("cat /mnt/seen/file") == "written\n"
    assert vm.run("echo >/mnt/seen/other").returncode != 0


def test_the_guest_has_its_own_kernel_file_systems(on_qemu):
    assert on_qemu.check_output("cat /proc/sys/kernel/hostname /etc/machine-id; ls /run").split()[0] == on_qemu.name
    assert on_qemu.check_output("cat /proc/1/comm") == "init\n"
    assert "pytest-chvm" not in on_qemu.check_output("ls /run")


def test_commands_may_make_user_namespaces(on_qemu):
    assert on_qemu.check_output("unshare --user --map-root-user id -u") == "0\n"


def test_the_modules_of_the_guests_kernel_are_where_modprobe_looks(on_qemu):
    assert on_qemu.check_output("cd /lib/modules/$(uname -r) && grep -c /dummy.ko modules.dep") == "1\n"


def test_a_command_may_be_long(on_qemu):
    assert on_qemu.check_output("true " + "x" * (1 << 18) + "\necho 'the' \"end\"") == "the end\n"


def test_a_directory_and_an_environment_of_a_commands_own(on_qemu):
    assert on_qemu.check_output(["sh", "-c", "pwd; echo $A"], cwd="/usr/share", env={"A": "b c"}) == "/usr/share\nb c\n"


def test_a_program_that_is_not_there_is_said(on_qemu):
    for command in (["/none/such"], ["none-such"]):
        done = on_qemu.run(command)
        assert done.returncode == 127
        assert "not found" in done.stderr


def test_a_process_runs_beside_the_test(on_qemu):
    with on_qemu.popen([sys.executable, "-u", "-c", "import os; print(os.getcwd()); input()"], input="\n") as process:
        assert process.stdout.readline(60) == f"{os.getcwd()}\n"
        assert process.wait(60) == 0


def test_files_are_copied_to_and_from_the_layer(on_qemu, tmp_path):
    (tmp_path / "there").write_text("copied")
    on_qemu.put(tmp_path / "there", "/var/tmp/copy")
    assert on_qemu.get("/var/tmp/copy", tmp_path / "back").read_text() == "copied"
    assert not os.path.exists("/var/tmp/copy")


@pytest.fixture
def tool(request):
    """A program of the host's that not every host has."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed here (on Debian: package {request.param.replace('perf', 'linux-perf')})")
    return request.param


@pytest.mark.parametrize("tool", ["strace"], indirect=True)
def test_strace_shows_what_a_program_asks_of_the_guests_kernel(on_qemu, tool):
    done = on_qemu.run([tool, "-f", "-e", "trace=openat", "sh", "-c", "cat /etc/hostname"])
    assert (done.returncode, '"/etc/hostname"' in done.stderr) == (0, True)


@pytest.mark.parametrize("tool", ["bpftool"], indirect=True)
def test_bpftool_makes_maps_that_stay(on_qemu, tool):
    pinned = "/sys/fs/bpf/counts"
    on_qemu.check_output(f"{tool} map create {pinned} type array key 4 value 4 entries 2 name counts")
    on_qemu.check_output(f"{tool} map update pinned {pinned} key 1 0 0 0 value 7 0 0 0")
    assert "07 00 00 00" in on_qemu.check_output(f"{tool} map lookup pinned {pinned} key 1 0 0 0")
    assert on_qemu.check_output(f"{tool} prog list; rm {pinned}") == ""


@pytest.mark.parametrize("tool", ["perf"], indirect=True)
def test_perf_counts_samples_and_traces(on_qemu, tool):
    """With the events that need no counters of a processor's: software emulates none."""
    counted = on_qemu.run([tool, "stat", "-x,", "-e", "task-clock,syscalls:sys_enter_openat", "cat", "/etc/hostname"])
    counts = {line.split(",")[2]: float(line.split(",")[0]) for line in counted.stderr.splitlines()}
    assert counts["task-clock"] > 0
    assert counts["syscalls:sys_enter_openat"] > 0
    on_qemu.check_output(f"{tool} record -q -B -N -o /tmp/perf.data -e cpu-clock true && test -s /tmp/perf.data")


def test_it_is_a_clone_with_an_identity_of_its_own(vm, boot):
    other = boot(root="host", boot="clone")
    ids = [each.check_output("cat /etc/machine-id") for each in (vm, other)]
    assert vm.machine.origin.boot == other.machine.origin.boot == "clone"
    assert len({*ids, Path("/etc/machine-id").read_text()}) == 3


def test_it_cannot_be_saved_while_it_is_the_root(on_qemu):
    with pytest.raises(UnsupportedError, match="its root is the host's"):
        on_qemu.snapshot()


@pytest.mark.parametrize("other", ["root_disk", "initramfs"])
def test_there_is_one_root(chvm_vm, other, tmp_path):
    with pytest.raises(InvalidConfigError, match=f"root='host' and an? {other}"):
        chvm_vm(root="host", **{other: tmp_path / "file"})


def test_the_built_in_guest_mounts_a_shared_dir_where_it_is_asked_for_too(chvm_vm, tmp_path):
    (tmp_path / "file").write_text("shared")
    vm = chvm_vm(vmm="qemu", shared_dirs=[SharedDir("a", tmp_path, mount="/srv/a place")], boot="clone")
    with vm.snapshot().clone() as clone:
        for each in (vm, clone):
            assert each.check_output("cat '/srv/a place/file'") == "shared"


@pytest.mark.parametrize("mount", ["relative", "/", "", "/a\n", 3])
def test_a_mount_point_that_cannot_be_one_is_refused(mount, tmp_path):
    with pytest.raises(InvalidConfigError, match="expected an absolute path"):
        SharedDir("a", tmp_path, mount=mount)


@pytest.mark.parametrize("hidden", ["/etc/shadow", ["relative"], [3], 3])
def test_what_cannot_be_hidden_is_refused(hidden):
    with pytest.raises(InvalidConfigError, match="hidden"):
        HostRoot(hidden=hidden)


def test_what_is_hidden_can_be_chosen(chvm_vm, tmp_path):
    for name in ("key one", "key two"):
        (tmp_path / name).write_text("secret")
    (tmp_path / "link").symlink_to("key two")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory/key").write_text("secret")
    root = HostRoot(hidden=[f"{tmp_path}/key o*", tmp_path / "link", tmp_path / "directory", "/none/such"])
    shared = SharedDir("writable", tmp_path, mount="/writable", hidden=[tmp_path / "directory"])
    vm = chvm_vm(vmm="qemu", root=root, shared_dirs=[shared])
    assert vm.check_output(f"cd {tmp_path} && cat key* link && ls directory && test -s /etc/passwd") == ""
    done = vm.run("echo written >/writable/new; echo written >/writable/directory/new")
    assert "/writable/directory/new: Read-only file system" in done.stderr
    assert (tmp_path / "new").read_text() == "written\n"
    assert [path.name for path in (tmp_path / "directory").iterdir()] == ["key"]

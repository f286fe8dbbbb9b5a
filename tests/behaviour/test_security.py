"""What a VMM, its sidecars and its guest get to see of the host, looked at from both sides, with both VMMs."""

import os
import pty
import select
import socket
import stat
import subprocess

import psutil
import pytest

from pytest_chvm import HypervisorError, Settings, SharedDir, VmConfig
from pytest_chvm.drivers.cloud_hypervisor.landlock import NEEDED_ABI, landlock_abi
from pytest_chvm.host.directories import runtime_dir
from pytest_chvm.host.host import default_host
from pytest_chvm.host.keeper.remains import command_line
from pytest_chvm.host.keeper_client import PASSED_ENVIRONMENT
from pytest_chvm.machine.guest_choice import choose_guest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root changes its root directory and makes device nodes")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with `open` and `closed` to share, and a secret beside them."""
    directory = tmp_path_factory.mktemp("place")
    for name in ("open", "closed"):
        (directory / name / "sub").mkdir(parents=True)
        (directory / name / "file").write_text("shared")
    (directory / "secret").write_text("of the host's")
    return directory


@pytest.fixture(scope="module")
def secrets_of_the_test(tmp_path_factory):
    """A variable, an open file and a socket of the test's, all of which a child of it would inherit."""
    with (
        (tmp_path_factory.mktemp("secrets") / "marker").open("w") as marker,
        socket.socket() as peer,
        pytest.MonkeyPatch.context() as patch,
    ):
        peer.bind(("127.0.0.1", 0))
        peer.listen()
        for fd in (marker.fileno(), peer.fileno()):
            os.set_inheritable(fd, True)
        patch.setenv("CHVM_TEST_SECRET", "of the test's")
        # So that the keeper, of which all are children, starts with them too.
        default_host().close()
        yield marker, peer


@pytest.fixture(scope="module")
def listening_before(secrets_of_the_test):
    """What listens before the VM is booted."""
    return listening(everything_of_ours())


@pytest.fixture(scope="module")
def vm(chvm_vm_factory, vmm, place, listening_before):
    shares = [SharedDir("open", place / "open"), SharedDir("closed", place / "closed", read_only=True)]
    with chvm_vm_factory(vmm=vmm, name=f"secure-{vmm}", shared_dirs=shares) as machine:
        yield machine


@pytest.fixture
def family(vm):
    """The VMM and the virtiofsds, with all their children."""
    heads = [psutil.Process(pid) for pid in (vm.pid, *(sidecar.pid for sidecar in vm.handle.sidecars))]
    assert len(heads) == 3
    return [*heads, *(child for head in heads for child in head.children(recursive=True))]


def status_of(path):
    with open(path) as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)


def test_they_have_none_of_the_tests_environment(family):
    for process in family:
        assert process.environ().keys() <= set(PASSED_ENVIRONMENT), process


def test_they_have_none_of_the_tests_descriptors(family, secrets_of_the_test):
    ours = {(found.st_dev, found.st_ino) for found in (os.fstat(held.fileno()) for held in secrets_of_the_test)}
    for process in family:
        theirs = {(found.st_dev, found.st_ino) for found in map(os.stat, open_files(process.pid))}
        assert theirs
        assert not ours & theirs, process


def open_files(pid):
    return [path for fd in os.listdir(f"/proc/{pid}/fd") if os.path.exists(path := f"/proc/{pid}/fd/{fd}")]


def test_each_thread_is_under_a_filter_of_system_calls(family, vm, vmm):
    # Cloud Hypervisor's first thread waits for the others to end, and its authors leave it without a filter.
    waits = vm.pid if vmm == "cloud-hypervisor" else None
    for process in family:
        threads = {int(entry) for entry in os.listdir(f"/proc/{process.pid}/task")}
        assert threads - {waits}
        for thread in threads - {waits}:
            assert status_of(f"/proc/{process.pid}/task/{thread}/status")["Seccomp"] == "2", (process, thread)


def test_its_directories_are_its_users_alone(vm):
    directory = vm.handle.run_dir
    while directory != runtime_dir().parent:
        found = directory.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o700, os.geteuid()), directory
        directory = directory.parent


@needs_root
def test_virtiofsd_sees_its_directory_only_and_may_make_no_devices(vm, place):
    # linux/capability.h
    net_admin, sys_chroot, sys_ptrace, sys_admin, mknod = 12, 18, 19, 21, 27
    for sidecar, name in zip(vm.handle.sidecars, ("open", "closed"), strict=True):
        assert os.path.samefile(f"/proc/{sidecar.pid}/root", place / name)
        has = int(status_of(f"/proc/{sidecar.pid}/status")["CapEff"], 16)
        assert [number for number in (net_admin, sys_chroot, sys_ptrace, sys_admin, mknod) if has >> number & 1] == []


def test_a_read_only_share_takes_no_change_whatever_the_guests_root_tries(vm, place):
    def tree():
        return {
            path: (path.lstat().st_mode, path.lstat().st_uid, path.lstat().st_mtime_ns)
            for path in sorted((place / "closed").rglob("*"))
        }

    before = tree()
    vm.run("mount -o remount,rw /mnt/closed; mkdir -p /tmp/again; mount -t virtiofs -o rw closed /tmp/again")
    for change in ("echo x >file", "echo x >>file", "touch new", "mkdir new", "rm file", "rmdir sub", "mv file moved", "ln file linked",
                   "ln -s file linked", "chmod 777 file", "chown 1 file", "truncate -s 0 file", "touch -d '2001-01-01 00:00' file", "mkfifo pipe"):  # fmt: skip
        assert vm.run(f"cd /mnt/closed && {change}").returncode != 0, change
    assert tree() == before
    assert (place / "closed" / "file").read_text() == "shared"


def test_a_guest_cannot_leave_a_share_by_dots_or_links(vm, place):
    share = place / "open"
    (share / "link").symlink_to(place / "secret")
    (share / "up").symlink_to("../secret")
    (share / "above").symlink_to("..")
    vm.check_output("cd /mnt/open; ln -s ../../../../../../secret made; ln -s / root")
    for way in ("../secret", "link", "up", "above/secret", "./sub/../../secret", "made", f"root{place}/secret"):
        assert "of the host" not in vm.run(f"cat /mnt/open/{way}").stdout, way
    # By a link the guest writes to a file of its own, or to none.
    vm.run(f"mkdir -p {place}; echo changed >/mnt/open/link; echo changed >/mnt/open/up; echo changed >/mnt/open/made")
    assert (place / "secret").read_text() == "of the host's"


@needs_root
def test_a_device_node_in_a_share_is_none_of_the_hosts(vm, place):
    vm.run("mknod /mnt/open/mem c 1 1; mknod /mnt/open/disk b 254 0")
    assert not (place / "open" / "mem").exists()
    assert not (place / "open" / "disk").exists()
    # One that the host has there: a terminal, at whose other end we would see what comes through.
    outer, inner = pty.openpty()
    try:
        os.mknod(place / "open" / "terminal", stat.S_IFCHR | 0o666, os.fstat(inner).st_rdev)
        vm.run("echo through >/mnt/open/terminal; head -c 1 /mnt/open/terminal", timeout=5)
        assert select.select([outer], [], [], 0)[0] == []
    finally:
        (place / "open" / "terminal").unlink()
        os.close(outer)
        os.close(inner)


def listening(processes):
    return {
        (socket.SocketKind(found.type).name, *found.laddr)
        for process in processes
        for found in process.net_connections(kind="inet")
        if found.laddr and (found.status == psutil.CONN_LISTEN or found.type == socket.SOCK_DGRAM)
    }


def everything_of_ours():
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def test_on_a_tap_nothing_of_ours_listens(vm, listening_before):
    if not vm.handle.taps:
        pytest.skip("no TAP can be made here")
    vm.address(8080)
    assert listening(everything_of_ours()) == listening_before


def test_in_user_mode_only_what_was_asked_for_listens_and_on_loopback(boot, vmm):
    if vmm != "qemu":
        pytest.skip("Cloud Hypervisor has no user-mode network")
    before = listening(everything_of_ours())
    vm = boot(network="user")
    assert listening(everything_of_ours()) == before
    host, port = vm.address(8080)
    assert host == "127.0.0.1"
    assert listening(everything_of_ours()) - before == {("SOCK_STREAM", host, port)}


def test_landlock_keeps_cloud_hypervisor_to_what_its_vm_has_and_lets_all_of_that_through(boot, vmm, place, tmp_path):
    if vmm != "cloud-hypervisor":
        pytest.skip("QEMU has no Landlock")
    if landlock_abi() < NEEDED_ABI:
        pytest.skip(f"this kernel has version {landlock_abi()} of Landlock, and Cloud Hypervisor wants {NEEDED_ABI}; see tests/lab")
    base, root, outside = tmp_path / "base.img", tmp_path / "root.qcow2", tmp_path / "outside.img"
    base.write_bytes(b"mark" + bytes((1 << 20) - 4))
    outside.write_bytes(bytes(1 << 20))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.name, root], check=True)
    initramfs = choose_guest(VmConfig(), Settings.resolve()).config.initramfs
    vm = boot(root_disk=root, initramfs=initramfs, cmdline="console=ttyS0 quiet chvm.share=s", shared_dirs={"s": place / "open"})
    assert "--landlock" in command_line(vm.pid)
    # Past the plugin's own word that there is no room for it: the kernel's is the one that counts.
    with pytest.raises(HypervisorError, match="Permission denied"):
        vm.machine.driver.add_disk(vm.handle, outside, read_only=False)
    assert vm.check_output("head -c 4 /dev/vda; cat /mnt/s/file") == "markshared"
    vm.listen_vsock(5000).close()
    vm.reboot()
    assert vm.check_output("head -c 4 /dev/vda; cat /mnt/s/file") == "markshared"

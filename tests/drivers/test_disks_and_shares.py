"""Disks, shared dirs and paths of every kind, in real guests and as what virtiofsd is started with."""

import os
import shutil
import socket
import stat
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_chvm import BootFailedError, CloudHypervisorDriver, MissingRequirementError, Settings, SharedDir, VmState, launch
from pytest_chvm.drivers.disks import backing_files
from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.host import virtiofsd
from pytest_chvm.host.directories import LONGEST_RUNTIME_DIR, runtime_dir
from pytest_chvm.host.host import default_host
from pytest_chvm.host.processes import end_process
from pytest_chvm.host.virtiofsd import Virtiofsd, find_virtiofsd

# Everything that an option's parser, a shell or a text could take amiss, short of a slash and a NUL.
ODD_NAME = "a b,c,,d=e[f]{g}\"h\"'i'\\j\n$k;l*m%n:größe"
ODDEST_NAME = ODD_NAME + os.fsdecode(b"\xff\xfe")


def installed_virtiofsds():
    """What is there of both dialects: by the option's variable, on PATH and where distributions put it."""
    named = [os.environ.get("CHVM_VIRTIOFSD"), shutil.which("virtiofsd")]
    named += [os.path.join(place, "virtiofsd") for place in virtiofsd.PLACES]
    found = {}
    for path in named:
        if path and os.access(path, os.X_OK):
            program = find_virtiofsd(Path(path))
            found.setdefault("rust" if program.is_rust else "c", program)
    return found


@pytest.fixture(params=["rust", "c"])
def real_virtiofsd(request):
    found = installed_virtiofsds()
    if request.param not in found:
        pytest.skip(f"the {request.param} virtiofsd is not installed; name one with CHVM_VIRTIOFSD")
    return found[request.param]


def make_image(path, size_mb):
    path.write_bytes(bytes(size_mb << 20))
    return path


def test_disks_and_paths_of_every_kind_in_a_real_guest(guest, tmp_path):
    """The guest sees vda, vdb, vdc in order; the root disk is never written, the data disk keeps what was, the seed is read-only."""
    directory = tmp_path / ODDEST_NAME
    directory.mkdir()
    kernel, initramfs = directory / "vmlinuz", directory / "initrd"
    shutil.copy(guest.kernel, kernel)
    shutil.copy(guest.initramfs, initramfs)
    root, seed, data = make_image(directory / "root", 3), make_image(directory / "seed", 1), make_image(directory / "data", 2)
    with launch(
        vmm="qemu", network="none", kernel=kernel, initramfs=initramfs, cmdline="console=ttyS0 quiet", root_disk=root, seed_iso=seed,
        data_disk=data, serial_log=directory / "serial.log", name="odd",
    ) as vm:  # fmt: skip
        assert vm.check_output("cat /sys/block/vda/size /sys/block/vdb/size /sys/block/vdc/size").split() == [
            "6144",
            "2048",
            "4096",
        ]
        assert vm.check_output("cat /sys/block/vda/ro /sys/block/vdb/ro /sys/block/vdc/ro").split() == ["0", "1", "0"]
        for disk in ("vda", "vdc"):
            vm.check_output(f"printf 'written to {disk}' | dd of=/dev/{disk} conv=fsync,notrunc; sync")
        assert vm.run("printf x | dd of=/dev/vdb conv=fsync").returncode != 0
        assert vm.check_output("head -c 14 /dev/vda") == "written to vda"
        assert b"CHVM_READY" in vm.serial_log.read_bytes()
    assert root.read_bytes() == bytes(3 << 20)
    assert seed.read_bytes() == bytes(1 << 20)
    assert data.read_bytes()[:14] == b"written to vdc"


def test_shares_of_both_kinds_with_odd_names(real_virtiofsd, tmp_path):
    writable, readable = tmp_path / ODD_NAME, tmp_path / f"ro {ODD_NAME}"
    for directory in (writable, readable):
        directory.mkdir()
        (directory / "file").write_text(f"from {directory.name[:2]}")
    (writable / ODDEST_NAME).write_text("odd")
    settings = replace(Settings.resolve(), virtiofsd=real_virtiofsd.path)
    shares = [SharedDir("rw", writable), SharedDir("ro", readable, read_only=True)]
    with launch(vmm="qemu", network="none", settings=settings, shared_dirs=shares, serial_log=tmp_path / "serial.log") as vm:
        assert vm.check_output("cat /mnt/rw/file") == "from a "
        assert vm.check_output("cat /mnt/ro/file") == "from ro"
        assert vm.run(["cat", f"/mnt/rw/{ODDEST_NAME}"]).stdout == "odd"
        vm.check_output("echo from the guest >/mnt/rw/new; mkdir /mnt/rw/dir; chmod 750 /mnt/rw/dir")
        assert (writable / "new").read_text() == "from the guest\n"
        assert stat.S_IMODE((writable / "dir").stat().st_mode) == 0o750
        assert vm.run("mknod /mnt/rw/disk b 8 0").returncode != 0
        # No cache: what the host writes is there at once.
        (writable / "file").write_text("changed on the host")
        assert vm.check_output("cat /mnt/rw/file") == "changed on the host"
        # Read-only by the host's doing: the guest may mount as it likes.
        assert vm.run("touch /mnt/ro/new").returncode != 0
        vm.run("mkdir /tmp/again; umount /mnt/ro; mount -t virtiofs ro /tmp/again")
        assert vm.check_output("cat /tmp/again/file") == "from ro"
        done = vm.run("echo x >/tmp/again/new || echo x >/tmp/again/file")
        assert done.returncode != 0
        sidecars = vm.handle.sidecars
        assert len(sidecars) == 2
    assert sorted(os.listdir(readable)) == ["file"]
    assert (readable / "file").read_text() == "from ro"
    assert not [sidecar for sidecar in sidecars if os.path.exists(f"/proc/{sidecar.pid}")]


@pytest.mark.parametrize("read_only", [False, True])
def test_arguments_of_the_rust_virtiofsd(read_only, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    share = SharedDir("t", f"/d/{ODD_NAME}", read_only)
    words = Virtiofsd(Path("/bin/virtiofsd"), is_rust=True).command(share, Path("/run/s"))
    assert words[0] == "/bin/virtiofsd"
    assert {"--socket-path=/run/s", f"--shared-dir=/d/{ODD_NAME}", "--sandbox=chroot", "--modcaps=-mknod"} <= set(words)
    assert {"--cache=never", "--inode-file-handles=never"} <= set(words)
    assert ("--readonly" in words) is read_only


def test_the_hosts_root_by_a_virtiofsd_that_cannot_serve_read_only_by_itself(tmp_path):
    if "c" not in (found := installed_virtiofsds()):
        pytest.skip("the C virtiofsd is not installed")
    settings = replace(Settings.resolve(), virtiofsd=found["c"].path)
    with launch(vmm="qemu", network="none", boot="cold", settings=settings, root="host") as vm:
        vm.check_output("mkdir /below && mount -t virtiofs -o rw chvm-root /below")
        for place in (str(tmp_path), "/run", "/etc/shadow"):
            done = vm.run(f"echo written >/below{place}/new || echo written >/below{place}")
            assert done.returncode != 0, place
        assert vm.check_output("cat /below/etc/shadow; ls /below/run") == ""
    assert list(tmp_path.iterdir()) == []


def test_arguments_of_the_c_virtiofsd(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    program = Virtiofsd(Path("/bin/virtiofsd"), is_rust=False)
    words = program.command(SharedDir("t", "/d/a,b\\c d"), Path("/run/s"))
    assert "--socket-path=/run/s" in words
    assert words[words.index("-o") + 1].startswith("source=/d/a\\,b\\\\c d,")
    assert {"sandbox=chroot", "modcaps=-mknod"} <= set(words[words.index("-o") + 1].split(","))
    command = program.command(SharedDir("t", "/d/a,b", read_only=True), Path("/run/s"))
    # It has no such option, so what it is given is a read-only mount.
    assert command[:4] == ["unshare", "--mount", "--propagation", "private"]
    assert command[7:11] == ["/d/a,b", "/run/s.mount", "ro", ""]
    assert command[command.index("-o") + 1].startswith("source=/run/s.mount/tree,")


def test_without_root_the_sandbox_is_a_namespace(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    words = Virtiofsd(Path("/bin/virtiofsd"), is_rust=True).command(SharedDir("t", "/d"), Path("/run/s"))
    assert "--sandbox=namespace" in words
    assert not [word for word in words if word.startswith("--modcaps")]


def test_without_root_the_c_one_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(MissingRequirementError, match="works for root only: install the Rust one"):
        Virtiofsd(Path("/bin/virtiofsd"), is_rust=False).command(SharedDir("t", "/d"), Path("/run/s"))


@pytest.mark.parametrize(
    ("version", "is_rust"),
    [
        ("virtiofsd 1.14.0", True),
        ("virtiofsd backend 1.10.0", True),
        ("virtiofsd version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", False),
        ("using FUSE kernel interface version 7.36", False),
    ],
)
def test_dialect_is_told_by_the_version(stand_in_virtiofsd, version, is_rust):
    stand_in_virtiofsd.does(version=version)
    assert find_virtiofsd().is_rust is is_rust


def test_a_sidecar_serves_the_directory_at_the_vms_socket(ch, stand_in_ch, stand_in_virtiofsd, tmp_path):
    handle = ch.boot(shared_dirs={"code": tmp_path})
    record = stand_in_virtiofsd.record(handle.sidecars[0].pid)
    assert {f"--socket-path={handle.run_dir}/fs0.sock", f"--shared-dir={tmp_path}"} <= set(record["argv"])


def test_socket_must_be_there_within_five_seconds(ch, stand_in_ch, stand_in_virtiofsd, tmp_path, monkeypatch, wait_ended):
    assert virtiofsd.SOCKET_TIMEOUT_S == 5
    monkeypatch.setattr(virtiofsd, "SOCKET_TIMEOUT_S", 0.3)
    stand_in_virtiofsd.does(makes_socket=False, says="waiting for Godot\n", ignores_sigterm=True)
    with pytest.raises(BootFailedError) as caught:
        ch.boot(shared_dirs={"code": tmp_path})
    for part in ("'code'", str(tmp_path), "did not listen at its socket within 0.3 s", "waiting for Godot"):
        assert part in str(caught.value)
    assert stand_in_ch.records() == []
    assert all(wait_ended(record["pid"], 2) for record in stand_in_virtiofsd.records())


def test_sidecar_that_exits_is_noticed_at_once(ch, stand_in_ch, stand_in_virtiofsd, tmp_path):
    stand_in_virtiofsd.does(exits_with=1, says="no such option\n")
    with pytest.raises(BootFailedError) as caught:
        ch.boot(shared_dirs={"code": tmp_path})
    for part in ("'code'", str(tmp_path), "ended with status 1", "no such option"):
        assert part in str(caught.value)


def test_stale_socket_is_removed(stand_in_virtiofsd, tmp_path):
    """The stand-in would fail to bind where there is one."""
    path = tmp_path / "fs.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    served = virtiofsd.serve_share(find_virtiofsd(), SharedDir("a", tmp_path), path, default_host())
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    finally:
        end_process(served.process, ("virtiofsd",), term_timeout_s=1, kill_timeout_s=1)


def test_a_second_virtiofsd_is_told_from_the_connections_of_the_first(stand_in_virtiofsd, tmp_path):
    path = tmp_path / "fs.sock"
    # Many, since which comes first in the kernel's table is chance.
    with socket.socket(socket.AF_UNIX) as first, ExitStack() as connections:
        first.bind(str(path))
        first.listen()
        for _ in range(20):
            connections.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))
            connections.enter_context(first.accept()[0])
        first.close()
        served = virtiofsd.serve_share(find_virtiofsd(), SharedDir("a", tmp_path), path, default_host())
    end_process(served.process, ("virtiofsd",), term_timeout_s=1, kill_timeout_s=1)


def test_a_virtiofsd_is_there_when_it_listens_and_not_when_it_has_made_its_socket(stand_in_virtiofsd, tmp_path, monkeypatch):
    stand_in_virtiofsd.does(listens=False)
    monkeypatch.setattr(virtiofsd, "SOCKET_TIMEOUT_S", 0.3)
    with pytest.raises(BootFailedError, match=r"did not listen at its socket within 0.3 s"):
        virtiofsd.serve_share(find_virtiofsd(), SharedDir("a", tmp_path), tmp_path / "fs.sock", default_host())
    assert (tmp_path / "fs.sock").exists()


def test_no_virtiofsd_names_the_packages(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(virtiofsd, "PLACES", (str(tmp_path / "libexec"),))
    with pytest.raises(MissingRequirementError) as caught:
        find_virtiofsd()
    for part in ("on PATH", f"{tmp_path}/libexec", "apt install virtiofsd", "qemu-system-common", "--chvm-virtiofsd"):
        assert part in str(caught.value)


def test_virtiofsd_is_looked_for_where_distributions_put_it():
    assert {"/usr/libexec", "/usr/lib/virtiofsd", "/usr/lib/qemu"} <= set(virtiofsd.PLACES)


def test_virtiofsd_that_fails_is_reported_and_not_skipped(stand_in_virtiofsd):
    stand_in_virtiofsd.does(version="", version_status=3)
    stand_in_virtiofsd.path.touch()
    with pytest.raises(InvalidConfigError, match="does not work: '--version' ended with status 3"):
        find_virtiofsd()


def test_deep_test_directory(vmm, tmp_path, wait_for_file):
    """A socket's path may have 107 bytes: those of a VM are elsewhere than its logs."""
    deep = tmp_path.joinpath(*["d" * 100] * 8)
    handle = vmm.boot(serial_log=deep / "serial.log", name="x" * 63)
    assert len(os.fsencode(handle.serial_log)) > 800
    assert handle.serial_log.exists()
    wait_for_file(handle.run_dir / {"qemu": "qmp.sock", "cloud-hypervisor": "api.sock"}[handle.vmm])
    vmm.driver.pause(handle)
    assert vmm.driver.state(handle).state is VmState.PAUSED
    assert len(os.fsencode(handle.run_dir)) < 70


@pytest.mark.parametrize("variable", ["XDG_RUNTIME_DIR", "TMPDIR"])
def test_deep_runtime_directory_is_not_used(monkeypatch, tmp_path, variable):
    import tempfile

    deep = tmp_path.joinpath(*["d" * 100] * 3)
    deep.mkdir(parents=True)
    monkeypatch.setenv(variable, str(deep))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert len(os.fsencode(runtime_dir())) <= LONGEST_RUNTIME_DIR + len("/pytest-chvm-0000")


def test_runtime_directory_of_somebody_else_is_refused(monkeypatch, tmp_path):
    import tempfile

    base = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
        (base / "pytest-chvm").mkdir(mode=0o777)
        (base / "pytest-chvm").chmod(0o777)
        with pytest.raises(InvalidConfigError, match=r"not a directory of yours alone \(0700\)"):
            runtime_dir()
        (base / "pytest-chvm").rmdir()
        (base / "pytest-chvm").symlink_to(tmp_path)
        with pytest.raises(InvalidConfigError, match="of yours alone"):
            runtime_dir()
    finally:
        shutil.rmtree(base)


def test_qemu_img_that_is_missing_is_named(ch, stand_in_ch, tmp_path, monkeypatch):
    root = make_image(tmp_path / "root.img", 1)
    only = tmp_path / "only"
    only.mkdir()
    (only / "cloud-hypervisor").symlink_to(stand_in_ch.path)
    monkeypatch.setenv("PATH", str(only))
    with pytest.raises(MissingRequirementError, match="qemu-utils"):
        CloudHypervisorDriver().boot(ch.config(root_disk=root))


def test_overlay_can_stand_on_a_base_that_another_vm_uses(vmm, tmp_path):
    root = make_image(tmp_path / "root.img", 1)
    first, second = vmm.boot(name="one", root_disk=root), vmm.boot(name="two", root_disk=root, serial_log=None)
    assert {vmm.driver.state(handle).state for handle in (first, second)} == {VmState.RUNNING}
    assert {tuple(backing_files(handle.run_dir / "root.qcow2")) for handle in (first, second)} == {(root,)}

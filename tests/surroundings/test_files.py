"""Files as hosts and guests have them: without a size, linked, owned, with holes, growing, and large."""

import os
import socket
import stat
import tracemalloc

import pytest

from pytest_chvm import InvalidConfigError, VmIOError
from pytest_chvm.guest import fetch

MIB = 1 << 20


@pytest.fixture(scope="module")
def vm(chvm_vm_factory):
    """One VM for all tests that leave it as it was."""
    with chvm_vm_factory(vmm="qemu", network="none") as vm:
        yield vm


@pytest.mark.parametrize("path", ["/proc/version", "/proc/1/environ", "/sys/class/net/lo/mtu", "/proc/sys/kernel/random/boot_id"])
def test_files_that_do_not_say_their_size(vm, tmp_path, path):
    there = vm.run(["cat", path]).stdout_bytes
    assert there
    assert vm.get(path, tmp_path).read_bytes() == there


def test_a_tree_of_files_that_do_not_say_their_size(vm, tmp_path):
    got = vm.get("/proc/sys/kernel/random", tmp_path / "random")
    assert (got / "boot_id").read_text() == vm.check_output("cat /proc/sys/kernel/random/boot_id")
    assert (got / "poolsize").read_text() == "256\n"


def test_a_file_that_does_not_say_its_size_is_got_whole_or_not_at_all(vm, tmp_path, monkeypatch):
    size = len(vm.run("cat /proc/version").stdout_bytes)
    monkeypatch.setattr(fetch, "LARGEST_UNSIZED", size)
    assert len(vm.get("/proc/version", tmp_path).read_bytes()) == size
    monkeypatch.setattr(fetch, "LARGEST_UNSIZED", size - 1)
    with pytest.raises(
        VmIOError, match=rf"version does not say its size, and has more than {size - 1} bytes: have the guest copy it"
    ):
        vm.get("/proc/version", tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize("link", ["../usr/lib/os-release", "/usr/lib/os-release", "os-release.real"])
def test_a_link_that_is_got_is_followed(vm, tmp_path, link):
    vm.check_output("mkdir -p /usr/lib; echo ID=guest | tee /usr/lib/os-release >/etc/os-release.real")
    vm.check_output(["ln", "-sf", link, "/etc/os-release"])
    got = vm.get("/etc/os-release", tmp_path)
    assert (got.name, got.is_symlink(), got.read_text()) == ("os-release", False, "ID=guest\n")


def test_a_link_that_is_put_is_followed(vm, tmp_path):
    (tmp_path / "real").write_text("data")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    vm.put(tmp_path / "link", "/tmp/")
    assert vm.check_output("[ ! -L /tmp/link ] && cat /tmp/link") == "data"
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(InvalidConfigError, match="is a link to 'nowhere', which is not there"):
        vm.put(tmp_path / "dangling", "/tmp/")


def test_links_of_a_tree_are_kept_and_those_that_lead_out_are_told(vm, tmp_path):
    vm.check_output(
        "mkdir -p /tmp/links/sub; cd /tmp/links; echo x >sub/file; ln -s sub/file in; ln sub/file hard; ln -s /etc/x out"
    )
    with pytest.raises(VmIOError, match=r"was got to .*, but not all of it: out is a link that leads out of it, to '/etc/x'"):
        vm.get("/tmp/links", tmp_path / "got")
    got = tmp_path / "got"
    assert sorted(path.name for path in got.iterdir()) == ["hard", "in", "sub"]
    assert os.readlink(got / "in") == "sub/file"
    assert (got / "hard").read_text() == "x\n"


def test_what_is_put_keeps_owners_modes_times_and_links(vm, tmp_path):
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "file").write_text("x")
    (tree / "big").write_bytes(os.urandom(2 * MIB + 5))
    os.link(tree / "big", tree / "sub" / "same")
    (tree / "in").symlink_to("sub/same")
    (tree / "out").symlink_to("/none")
    for name, mode, owner in (("file", 0o4751, (1234, 56)), ("big", 0o640, (7, 8)), ("sub", 0o2770, (1, 2))):
        os.chown(tree / name, *owner)
        (tree / name).chmod(mode)
        os.utime(tree / name, (1_000_000_000, 1_000_000_000))
    vm.put(tree, "/tmp/tree")
    assert vm.check_output(
        "cd /tmp/tree; stat -c '%n %a %u %g %Y' file big sub; readlink in; readlink out; stat -c %h big; cmp big sub/same"
    ) == ("file 4751 1234 56 1000000000\nbig 640 7 8 1000000000\nsub 2770 1 2 1000000000\nsub/same\n/none\n2\n")
    assert vm.get("/tmp/tree/big", tmp_path / "back").read_bytes() == (tree / "big").read_bytes()
    vm.run("rm -rf /tmp/tree")


def test_sockets_that_are_put_are_told(vm, tmp_path):
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "tree" / "z").write_text("z")
    with socket.socket(socket.AF_UNIX) as listens:
        listens.bind(str(tmp_path / "tree" / "sub" / "listens"))
    with pytest.raises(VmIOError, match=r"was put to '/tmp/sockets', but not all of it: sub/listens is a socket$"):
        vm.put(tmp_path / "tree", "/tmp/sockets")
    assert vm.check_output("cd /tmp/sockets; find . -type f; ls sub") == "./z\n"
    with pytest.raises(InvalidConfigError, match="is a socket, which cannot be put"):
        vm.put(tmp_path / "tree" / "sub" / "listens", "/tmp/")


def test_a_gigabyte_of_holes_goes_both_ways_as_holes(vm, tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
        os.pwrite(file.fileno(), b"begin", 0)
        os.pwrite(file.fileno(), b"middle", 19 * MIB + 777)
    vm.put(tmp_path / "sparse", "/tmp/sparse")
    size, blocks = map(int, vm.check_output("stat -c '%s %b' /tmp/sparse").split())
    assert size == 1 << 30
    assert blocks * 512 < MIB
    vm.check_output("truncate -s 40M /tmp/sparse")
    got = vm.get("/tmp/sparse", tmp_path / "back")
    assert got.stat().st_size == 40 * MIB
    assert got.stat().st_blocks * 512 < MIB
    with got.open("rb") as file:
        assert file.read(5) == b"begin"
        assert os.pread(file.fileno(), 8, 19 * MIB + 776) == b"\0middle\0"
    vm.run("rm /tmp/sparse")


def test_large_files_are_held_in_memory_by_nobody(vm, tmp_path):
    data = os.urandom(MIB) * 6
    (tmp_path / "large").write_bytes(data)
    tracemalloc.start()
    try:
        vm.put(tmp_path / "large", "/tmp/large")
        got = vm.get("/tmp/large", tmp_path / "back")
        assert tracemalloc.get_traced_memory()[1] < len(data)
    finally:
        tracemalloc.stop()
    assert got.read_bytes() == data
    vm.run("rm /tmp/large")


def test_a_file_that_grows_and_special_ones(vm, tmp_path):
    vm.check_output("(while :; do echo line >>/run/grows; done) & echo $! >/run/grows.pid")
    try:
        for _time in range(3):
            assert vm.get("/run/grows", tmp_path / "grows").read_text().startswith("line\n")
    finally:
        vm.check_output("kill $(cat /run/grows.pid); rm /run/grows; mkdir /run/odd; mkfifo /run/odd/fifo; echo x >/run/odd/x")
    with pytest.raises(VmIOError, match="fifo is neither a file, a directory nor a link"):
        vm.get("/run/odd", tmp_path / "odd")
    assert (tmp_path / "odd" / "x").read_text() == "x\n"
    assert stat.S_IMODE((tmp_path / "odd" / "x").stat().st_mode) == 0o644

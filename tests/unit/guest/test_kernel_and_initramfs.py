"""Kernels, their modules in order, and the archive the built-in guest is."""

import gzip
import io
import itertools
import lzma
import os
import shutil
import stat
import subprocess

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pytest_chvm import HostError, InvalidConfigError
from pytest_chvm.guest.initramfs import Entry, is_static_executable, write_cpio
from pytest_chvm.guest.kernels.kernel import inspect_kernel
from pytest_chvm.guest.kernels.modules import find_modules, modules_in_order


def bzimage(release=b"6.1.0-test (builder) #1 SMP"):
    image = bytearray(4096)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = (0x400).to_bytes(2, "little")
    image[0x600 : 0x600 + len(release)] = release
    return bytes(image)


@pytest.fixture
def tree(tmp_path):
    """An unpacked kernel package: `boot/` beside `lib/modules/`."""
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot" / "vmlinuz").write_bytes(bzimage())
    modules = tmp_path / "lib" / "modules" / "6.1.0-test"
    (modules / "kernel" / "drivers").mkdir(parents=True)
    return modules


def add_module(tree, name, depends="", softdep=None, suffix=".ko", compress=bytes):
    info = [b"license=GPL", b"depends=" + depends.encode()]
    if softdep:
        info.append(b"softdep=" + softdep.encode())
    info.append(b"name=" + name.encode())
    data = b"\x7fELF" + bytes(60) + b"\0" + b"\0".join(info) + b"\0" + bytes(16)
    path = tree / "kernel" / "drivers" / f"{name}{suffix}"
    path.write_bytes(compress(data))
    return data


def order(tree, *wanted):
    return [module.name for module in modules_in_order(tree, wanted)]


def test_release_and_modules_of_a_bzimage(tree):
    kernel = inspect_kernel(tree.parents[2] / "boot" / "vmlinuz")
    assert (kernel.release, kernel.modules_dir) == ("6.1.0-test", tree)


def test_release_of_an_uncompressed_kernel(tmp_path):
    image = tmp_path / "vmlinux"
    # The banner across the border of two reads.
    image.write_bytes(b"\x7fELF" + bytes((1 << 20) - 20) + b"Linux version 6.9.1-custom (me@host) (gcc) #1\n\0")
    assert inspect_kernel(image).release == "6.9.1-custom"


def test_modules_beside_the_image_come_before_the_hosts(tree, tmp_path):
    assert find_modules(tmp_path / "boot" / "vmlinuz", "6.1.0-test") == tree
    assert find_modules(tmp_path / "boot" / "vmlinuz", "6.1.0-other") is None
    assert find_modules(tmp_path / "boot" / "vmlinuz", None) is None


@pytest.mark.parametrize("release", ["../../../etc", "/", "a/b"])
def test_release_that_is_a_path_is_not_followed(tmp_path, release):
    assert find_modules(tmp_path / "vmlinuz", release) is None


def test_each_module_comes_after_what_it_depends_on(tree):
    add_module(tree, "virtio")
    add_module(tree, "virtio_ring")
    add_module(tree, "virtio_net", "net_failover,virtio,virtio_ring")
    add_module(tree, "net_failover", "failover")
    add_module(tree, "failover")
    add_module(tree, "not_wanted")
    assert order(tree, "virtio_net") == ["failover", "net_failover", "virtio", "virtio_ring", "virtio_net"]


def test_dashes_and_underscores_are_one(tree):
    add_module(tree, "virtio-rng", "rng-core")
    add_module(tree, "rng_core")
    assert order(tree, "virtio_rng") == order(tree, "virtio-rng") == ["rng_core", "virtio_rng"]


def test_soft_dependencies_come_before_too(tree):
    add_module(tree, "ext4", "jbd2", softdep="pre: crc32c post: late")
    for name in ("jbd2", "crc32c", "late"):
        add_module(tree, name)
    found = order(tree, "ext4")
    assert set(found) == {"jbd2", "crc32c", "ext4"}
    assert found[-1] == "ext4"


def test_module_that_is_built_in_is_left_out(tree):
    add_module(tree, "virtio_blk", "virtio")
    assert order(tree, "virtio_blk", "virtio_console") == ["virtio_blk"]


def test_circle_of_modules_ends(tree):
    add_module(tree, "a", "b")
    add_module(tree, "b", "a")
    assert sorted(order(tree, "a")) == ["a", "b"]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".ko", bytes), (".ko.gz", gzip.compress), (".ko.xz", lzma.compress), (".ko.zst", zstandard.ZstdCompressor().compress)],
)
def test_compressed_modules_are_plain_afterwards(tree, suffix, compress):
    plain = add_module(tree, "virtio", "virtio_ring", suffix=suffix, compress=compress)
    add_module(tree, "virtio_ring", suffix=suffix, compress=compress)
    modules = modules_in_order(tree, ["virtio"])
    assert [module.name for module in modules] == ["virtio_ring", "virtio"]
    assert modules[1].data == plain


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.lists(st.sampled_from("abcdefgh"), max_size=4), max_size=8))
def test_order_of_any_graph_without_circles(depends):
    import tempfile
    from pathlib import Path

    # Only towards later letters, so that there is no circle.
    depends = {name: [other for other in others if other > name] for name, others in depends.items()}
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        (tree / "kernel" / "drivers").mkdir(parents=True)
        for name, others in depends.items():
            add_module(tree, name, ",".join(others))
        found = order(tree, *depends)
    assert sorted(found) == sorted(depends)
    for name, others in depends.items():
        assert all(found.index(other) < found.index(name) for other in others if other in depends)


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\0" * 5000], ids=["empty", "script", "zeros"])
def test_file_that_is_no_kernel(tmp_path, content):
    image = tmp_path / "vmlinuz"
    image.write_bytes(content)
    with pytest.raises(InvalidConfigError, match=r"is not a kernel: expected a bzImage, an ELF vmlinux"):
        inspect_kernel(image)


@pytest.fixture
def busybox():
    path = shutil.which("busybox")
    if path is None:
        pytest.skip("there is no busybox here")
    return path


@pytest.fixture
def unpack(busybox, tmp_path):
    def run(archive):
        directory = tmp_path / "unpacked"
        directory.mkdir()
        done = subprocess.run([busybox, "cpio", "-idm"], input=archive, cwd=directory, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return directory

    return run


ENTRIES = [
    Entry("bin", stat.S_IFDIR | 0o755),
    Entry("tmp", stat.S_IFDIR | 0o1777),
    Entry("bin/sh", stat.S_IFLNK | 0o777, b"/bin/busybox"),
    *(Entry(f"file{size}", stat.S_IFREG | 0o640, bytes(range(256))[:size]) for size in range(6)),
    Entry("long-" + "x" * 200, stat.S_IFREG | 0o755, b"y" * 100_000),
]


def test_archive_is_unpacked_as_it_was_packed(unpack):
    directory = unpack(write_cpio(iter(ENTRIES)))
    assert sorted(os.listdir(directory)) == sorted({entry.name.split("/")[0] for entry in ENTRIES})
    for entry in ENTRIES:
        path = directory / entry.name
        found = path.lstat()
        assert stat.S_IFMT(found.st_mode) == stat.S_IFMT(entry.mode)
        if stat.S_ISREG(entry.mode):
            assert path.read_bytes() == entry.data
        if stat.S_ISLNK(entry.mode):
            assert os.readlink(path) == entry.data.decode()
        else:
            assert stat.S_IMODE(found.st_mode) == stat.S_IMODE(entry.mode)


def test_device_nodes(unpack, needs_root):
    directory = unpack(write_cpio(iter([Entry("console", stat.S_IFCHR | 0o600, device=(5, 1))])))
    found = (directory / "console").lstat()
    assert stat.S_ISCHR(found.st_mode)
    assert (os.major(found.st_rdev), os.minor(found.st_rdev)) == (5, 1)


def test_same_entries_make_the_same_archive():
    assert write_cpio(iter(ENTRIES)) == write_cpio(iter(ENTRIES))
    assert len(write_cpio(iter(ENTRIES))) % 4 == 0


def test_static_executable_is_told_from_a_dynamic_one(tmp_path):
    static, dynamic = tmp_path / "static", tmp_path / "dynamic"
    static.write_bytes(b"\x7fELF" + bytes(5000))
    dynamic.write_bytes(b"\x7fELF" + bytes(500) + b"/lib64/ld-linux-x86-64.so.2\0" + bytes(5000))
    assert is_static_executable(static)
    assert not is_static_executable(dynamic)
    assert not is_static_executable(tmp_path / "none")
    assert not is_static_executable(tmp_path)


def test_processes_that_start_cold_build_once(tmp_path):
    """Eight that want the same thing at the same moment: one builds it, and nobody sees half of it."""
    import sys

    script = """
import sys, time
from pathlib import Path
from pytest_chvm.base.cache import built_once
target = Path(sys.argv[1])
def build(directory):
    (directory / "first").write_text("1")
    with (target.parent.parent / "builds").open("a") as log:
        log.write("built\\n")
    (directory / "second").write_text("2")
sys.stdin.readline()
place = built_once(target, build)
print(sorted(path.name for path in place.iterdir()))
"""
    target = tmp_path / "cache" / "thing"
    processes = [
        subprocess.Popen([sys.executable, "-c", script, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _number in range(8)
    ]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate()[0].strip() for process in processes] == ["['first', 'second']"] * 8
    assert (tmp_path / "builds").read_text() == "built\n"


def test_build_that_fails_leaves_nothing_and_can_be_tried_again(tmp_path):
    from pytest_chvm.base.cache import built_once

    target = tmp_path / "cache" / "thing"

    def fail(directory):
        (directory / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built_once(target, fail)
    assert [path.name for path in target.parent.iterdir() if path.suffix != ".lock"] == []
    assert built_once(target, lambda directory: (directory / "whole").touch()) == target
    assert os.listdir(target) == ["whole"]


def test_cache_that_cannot_be_written_says_what_to_set(tmp_path):
    from pytest_chvm.base.cache import built_once

    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="set CHVM_CACHE_DIR"):
        built_once(tmp_path / "file" / "thing", lambda directory: None)


def test_cpio_header_fields_are_hexadecimal():
    archive = io.BytesIO(write_cpio(iter([Entry("a", stat.S_IFREG | 0o644, b"data")])))
    assert archive.read(6) == b"070701"
    fields = [int(archive.read(8), 16) for _number in range(13)]
    assert fields[1] == stat.S_IFREG | 0o644
    assert fields[6] == 4
    assert list(itertools.islice(fields, 11, 12)) == [2]

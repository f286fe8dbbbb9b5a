"""Kernels, images and command lines that cannot be: refused before anything is started, with what to do."""

import gzip
import lzma
import os
import platform
import shutil
import struct
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pytest_chvm import BootFailedError, InvalidConfigError, MissingRequirementError, Settings, VmConfig, launch
from pytest_chvm.drivers.images import check_disk
from pytest_chvm.drivers.preflight import preflight
from pytest_chvm.guest.kernels.image import DEFAULT_CMDLINE_BYTES, check_kernel_image, why_silent
from pytest_chvm.host.limits import memory_limit, processors
from pytest_chvm.machine.guest_choice import built_in_kernel
from pytest_chvm.model import architecture
from pytest_chvm.model.disks import DATA, DISK_KINDS, ROOT, SEED, VmDisk

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels here are x86's")


@pytest.fixture(scope="module")
def vmlinuz():
    """The built-in guest's kernel, as its package has it."""
    return built_in_kernel(Settings.resolve()).image.read_bytes()


def elf(machine=62, kind=2, segments=(), bits=64):
    """An ELF file: its header, and program headers of (type, offset, size)."""
    identity = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1, 1]) + bytes(9)
    if bits == 64:
        header = identity + struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
        return header + b"".join(struct.pack("<IIQQQQQQ", t, 5, offset, 0, 0, size, size, 1) for t, offset, size in segments)
    header = identity + struct.pack("<HHIIIIIHHHHHH", kind, machine, 1, 0, 52, 0, 0, 52, 32, len(segments), 0, 0, 0)
    return header + b"".join(struct.pack("<IIIIIIII", t, offset, 0, 0, size, size, 5, 1) for t, offset, size in segments)


NOTE = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", 0x1000000)


def with_note(bits, machine=62):
    size = len(elf(bits=bits, segments=[(0, 0, 0)] * 2))
    return elf(machine, bits=bits, segments=[(1, 0, size), (4, size, len(NOTE))]) + NOTE


KERNELS = {
    "cut off": (lambda kernel: kernel[: len(kernel) * 9 // 10], r"is cut off: its header says \d+ bytes, and it has \d+"),
    "cut off early": (lambda kernel: kernel[:600], "is cut off"),
    "gzip": (lambda kernel: gzip.compress(kernel[:9000]), "what is packed .gzip. in the kernel .* is cut off"),
    "xz": (lambda kernel: lzma.compress(kernel[:9000]), "what is packed .xz. in the kernel .* is cut off"),
    "zstd": (
        lambda kernel: zstandard.ZstdCompressor().compress(kernel[:9000]),
        "what is packed .zstd. in the kernel .* is cut off",
    ),
    "arm64": (lambda _: bytes(56) + b"ARM\x64" + bytes(5000), "is a arm64 Image for aarch64, and this machine is x86_64"),
    "arm64 ELF": (lambda _: elf(183, segments=[(1, 0, 64)]), "is a ELF file for aarch64"),
    "riscv": (lambda _: b"MZ" + bytes(54) + b"RSC\x05" + bytes(5000), "for riscv64"),
    "EFI zboot": (lambda _: b"MZ\0\0zimg" + bytes(5000), "is packed .EFI zboot., and cannot be unpacked: it is cut off"),
    "unified": (lambda _: b"MZ" + bytes(5000), "is an EFI program.*--only-section=.linux"),
    "program": (lambda _: Path("/bin/ls").read_bytes(), "is a program for Linux"),
    "static program": (lambda _: elf(segments=[(1, 0, 64)]), "note that says where a VMM enters"),
    "object file": (lambda _: elf(kind=1), "nothing to load"),
    "ELF cut off": (lambda _: elf(segments=[(1, 0, 1 << 40)]), "segments end at byte 1099511627776"),
    "ELF without headers": (lambda _: elf(segments=[(1, 0, 64)] * 9)[:100], "program headers are not all there"),
    "big-endian": (lambda _: b"\x7fELF\2\2" + bytes(100), "not of a little-endian machine"),
    "text": (lambda _: b"#!/bin/sh\n" * 100, "is not a kernel: expected a bzImage"),
    "empty": (lambda _: b"", "nothing: it is empty"),
}


@pytest.mark.parametrize("kind", KERNELS)
def test_a_file_that_is_no_kernel_of_this_machine_is_refused(vmlinuz, tmp_path, kind):
    make, message = KERNELS[kind]
    image = tmp_path / "kernel"
    image.write_bytes(make(vmlinuz))
    with pytest.raises(InvalidConfigError, match=message) as caught:
        launch(kernel=image, vmm="qemu", network="none")
    assert str(image) in str(caught.value)


def test_kernels_of_each_format_are_taken(vmlinuz, guest, tmp_path):
    image = tmp_path / "kernel"
    image.write_bytes(vmlinuz)
    assert check_kernel_image(image).cmdline_bytes == DEFAULT_CMDLINE_BYTES
    # A signature comes behind the kernel.
    image.write_bytes(vmlinuz + bytes(1234))
    assert check_kernel_image(image).format == "bzImage"
    assert check_kernel_image(guest.kernel).format == "ELF file"
    for bits, machine in ((64, 62), (32, 62), (32, 3)):
        image.write_bytes(with_note(bits, machine))
        assert check_kernel_image(image).machine in ("x86_64", "i386")
    multiboot = elf(3, bits=32, segments=[(1, 0, 84)])
    image.write_bytes(multiboot + bytes(-len(multiboot) % 4) + b"\x02\xb0\xad\x1b")
    assert check_kernel_image(image).machine == "i386"


def any_file(*beginnings):
    """Bytes that begin like what is parsed, with anything in the fields."""
    begun = [st.binary(max_size=4096).map(lambda rest, start=start: start + rest) for start in beginnings]
    return st.one_of(st.binary(max_size=2048), *begun)


fuzzed = hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzzed
@given(
    any_file(
        b"\x7fELF",
        b"\x7fELF\2\1",
        b"\x7fELF\2\1" + bytes(12) + b"\x3e\0",
        b"\x7fELF\1\1" + bytes(12) + b"\3\0",
        bytes(0x202) + b"HdrS",
        b"MZ",
    )
)
@example(b"\x7fELF\2\1" + bytes(12) + b"\x3e\0" + b"\xff" * 44)
@example(b"\x7fELF\1\1" + bytes(12) + b"\3\0" + b"\xff" * 44)
def test_any_file_is_a_kernel_or_refused(tmp_path, content):
    image = tmp_path / "kernel"
    image.write_bytes(content)
    with suppress(InvalidConfigError):
        assert check_kernel_image(image, "x86_64").machine in ("x86_64", "i386")


@fuzzed
@given(
    any_file(b"QFI\xfb\0\0\0\3", b"QFI\xfb\0\0\0\2", b"QFI\xfb"),
    st.lists(st.tuples(st.integers(8, 103), st.sampled_from([0, 1, 9, 16, 21, 127, 255])), max_size=12),
    st.sampled_from(DISK_KINDS),
)
def test_any_file_is_a_disk_or_refused(tmp_path, content, fields, kind):
    content = bytearray(content)
    for place, value in fields:
        if place < len(content):
            content[place] = value
    image = tmp_path / "disk.qcow2"
    image.write_bytes(bytes(content))
    with suppress(InvalidConfigError):
        check_disk(VmDisk(kind, image))


def qemu_img(*words):
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, timeout=60)


@pytest.fixture
def raw(tmp_path):
    """A raw disk of 8 MiB with data in it."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(os.urandom(3 << 20) + bytes(5 << 20))
    return disk


@pytest.mark.parametrize("key", ["root_disk", "data_disk"])
@pytest.mark.parametrize(
    ("form", "name"), [("vdi", "VirtualBox"), ("vmdk", "VMware"), ("vhdx", "Hyper-V"), ("vpc", "Virtual PC"), ("qed", "QED")]
)
def test_an_image_of_another_program_is_refused_with_how_to_convert_it(raw, tmp_path, key, form, name):
    image = tmp_path / f"disk.{form}"
    qemu_img("convert", "-O", form, raw, image)
    with pytest.raises(InvalidConfigError, match=rf"VM 'vm': {key} .* {name} .*qemu-img convert -O qcow2"):
        preflight(VmConfig(kernel=built_in_kernel(Settings.resolve()).image, **{key: image}))


@pytest.mark.parametrize("kind", DISK_KINDS, ids=lambda kind: kind.id)
def test_a_file_that_is_no_disk_is_refused(tmp_path, kind):
    file = tmp_path / "disk"
    for content, message in (
        (b"", "it has 0 bytes"),
        (b"user-data: yes\n", r"it has 15 bytes.*begins with b'user-data: yes"),
        (bytes(513), "it has 513 bytes, and expected was a multiple of 512"),
        (gzip.compress(os.urandom(2000)) + b"\1", "is packed with gzip.*gunzip"),
    ):
        file.write_bytes(content)
        with pytest.raises(InvalidConfigError, match=message):
            check_disk(VmDisk(kind, file))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(InvalidConfigError, match="is a pipe, socket or character device"):
        preflight(VmConfig(kernel=built_in_kernel(Settings.resolve()).image, **{kind.field: fifo}))


def test_a_text_of_whole_sectors_is_no_root_disk(tmp_path):
    file = tmp_path / "disk"
    file.write_bytes(b"a line of a log\n" * 64)
    with pytest.raises(InvalidConfigError, match="is a text, and begins with b'a line of a log"):
        check_disk(VmDisk(ROOT, file))
    # A guest writes to its data disk what it likes.
    check_disk(VmDisk(DATA, file))


def test_a_seed_that_is_no_iso_is_refused_and_what_cloud_init_takes_is_not(tmp_path):
    seed = tmp_path / "seed"
    seed.write_bytes(b"user-data".ljust(4096, b"."))
    with pytest.raises(InvalidConfigError, match="is no ISO, and begins with b'user-data"):
        check_disk(VmDisk(SEED, seed))
    seed.write_bytes(bytes(32768) + b"\1CD001\1" + bytes(2041))
    check_disk(VmDisk(SEED, seed))
    seed.write_bytes(bytes(54) + b"FAT12   " + bytes(450) + bytes(512))
    check_disk(VmDisk(SEED, seed))
    # Of one that is still to be filled there is nothing to say.
    seed.write_bytes(bytes(4096))
    check_disk(VmDisk(SEED, seed))


@pytest.mark.parametrize(
    "options",
    [
        "",
        "cluster_size=512",
        "cluster_size=2M",
        "compat=0.10",
        "preallocation=falloc",
        "refcount_bits=1",
        "refcount_bits=64",
        "compressed",
    ],
)
def test_a_qcow2_that_is_cut_off_is_refused_and_a_whole_one_is_not(raw, tmp_path, options):
    image = tmp_path / "disk.qcow2"
    qemu_img("convert", "-O", "qcow2", *(["-c"] if options == "compressed" else ["-o", options] if options else []), raw, image)
    check_disk(VmDisk(ROOT, image))
    check_disk(VmDisk(DATA, image))
    size = image.stat().st_size
    for part in (0.75, 0.3, 0.01, 0):
        os.truncate(image, int(size * part) or 20)
        with pytest.raises(InvalidConfigError, match="is a qcow2 image that is cut off, at"):
            check_disk(VmDisk(ROOT, image))


def test_an_empty_qcow2_is_a_disk(tmp_path):
    for size in ("0", "1M", "10T"):
        image = tmp_path / f"{size}.qcow2"
        qemu_img("create", "-f", "qcow2", image, size)
        check_disk(VmDisk(ROOT, image))


def test_what_an_image_stands_on_must_be_there_and_not_itself(raw, tmp_path):
    below, top = tmp_path / "below.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", raw, below)
    qemu_img("create", "-f", "qcow2", "-F", "qcow2", "-b", below.name, top)
    check_disk(VmDisk(ROOT, top))
    os.truncate(below, 70_000)
    with pytest.raises(InvalidConfigError, match=rf"top.qcow2' stands on '{below}', which is a qcow2 image that is cut off"):
        check_disk(VmDisk(ROOT, top))
    below.unlink()
    with pytest.raises(InvalidConfigError, match=rf"stands on '{below}', which does not exist.*qemu-img rebase"):
        check_disk(VmDisk(ROOT, top))
    below.symlink_to(top)
    with pytest.raises(InvalidConfigError, match=r"top.qcow2' stands on itself: .* -> .*below.qcow2"):
        check_disk(VmDisk(DATA, top))
    # What is no file is QEMU's to find.
    qemu_img("create", "-f", "qcow2", "-u", "-F", "raw", "-b", "nbd://192.0.2.1", top, "1M")
    check_disk(VmDisk(ROOT, top))


def test_a_command_line_as_long_as_the_kernel_takes_is_the_guests(tmp_path):
    """What the machine itself has to say, of its address, name and shares, finds another way."""
    cmdline = "console=ttyS0 quiet pad=".ljust(DEFAULT_CMDLINE_BYTES, "x")
    tags = [f"share-{number}-".ljust(36, "x") for number in range(3)]
    with launch(vmm="qemu", cmdline=cmdline, boot="cold", shared_dirs=dict.fromkeys(tags, tmp_path)) as vm:
        assert vm.check_output("cat /proc/cmdline") == f"{cmdline}\n"
        assert vm.check_output("hostname").strip() == vm.name
        assert vm.ip in vm.check_output("ip -4 addr")
        mounts = vm.check_output("cat /proc/mounts")
        assert all(f" /mnt/{tag} virtiofs " in mounts for tag in tags)


def test_a_command_line_that_the_kernel_would_cut_off_is_refused():
    with pytest.raises(InvalidConfigError, match="command line has 2048 bytes, and this kernel takes 2047"):
        launch(vmm="qemu", network="none", cmdline="x" * 2048)


def test_a_command_line_with_no_room_for_what_an_image_is_told_is_refused_with_the_arithmetic(guest):
    with pytest.raises(
        InvalidConfigError, match=r"has 2\d\d\d bytes, 1990 of yours and \d+ that its networks need.*shorten it by \d+"
    ):
        launch(vmm="qemu", network="user", initramfs=guest.initramfs, cmdline="console=ttyS0 ".ljust(1990, "x"), boot="cold")


def test_more_processors_than_the_host_has_are_given(caplog):
    many = 4 * processors() + 1
    with launch(vmm="qemu", network="none", cpus=processors() + 1, boot="cold") as vm:
        assert int(vm.check_output("nproc")) == processors() + 1
    assert "it will be slow" not in caplog.text
    with launch(vmm="qemu", network="none", cpus=many, boot="cold", wait=False):
        assert f"has {many} processors, and the host {processors()}: it will be slow" in caplog.text


def test_more_memory_than_the_host_has_is_a_missing_requirement():
    too_much = (memory_limit() >> 20) + 1
    with pytest.raises(MissingRequirementError, match=rf"VM 'big': memory_mb={too_much}, and the host has"):
        launch(name="big", vmm="qemu", network="none", memory_mb=too_much)


def test_a_kernel_that_printed_nothing_is_said_with_likely_causes(vmlinuz, tmp_path):
    silent = tmp_path / "vmlinuz"
    # All there by its header, and nothing of it runs.
    silent.write_bytes(vmlinuz[:16384] + bytes(len(vmlinuz) - 16384))
    with pytest.raises(BootFailedError) as caught:
        launch(vmm="qemu", network="none", kernel=silent, cmdline="quiet", boot="cold", boot_timeout=2)
    for part in ("The kernel printed nothing; likely causes: ", "no console=", "told to be quiet", "the image is damaged"):
        assert part in str(caught.value)
    assert "quiet" not in why_silent("console=ttyS0", architecture("x86_64"))
    assert "console= " not in why_silent("console=ttyS0", architecture("x86_64"))


def test_a_host_that_is_too_small_is_skipped_where_that_is_asked_for(pytester, user_environment):
    pytester.makepyfile("""
        def test_big(chvm_vm):
            chvm_vm(vmm="qemu", network="none", memory_mb=10**8)

        def test_wrong(chvm_vm):
            chvm_vm(vmm="qemu", network="none", cpus=1000)
    """)
    done = pytester.runpytest_subprocess("-rs", "--chvm-missing=skip", "-p", "no:cacheprovider", timeout=60)
    done.assert_outcomes(skipped=1, failed=1)
    done.stdout.fnmatch_lines(
        ["*cpus=1000, and the host has*a VM can have 254*", "*no VM here*memory_mb=100000000, and the host has*"]
    )

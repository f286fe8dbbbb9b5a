"""The forms in which a kernel may be named: files, build trees, directories of what was installed, packages; and what is wrong with some."""

import bz2
import gzip
import lzma
import os
import shutil
import struct
import subprocess
from contextlib import suppress
from pathlib import Path

import lz4.block
import lz4.frame
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pytest_chvm import InvalidConfigError, MissingRequirementError
from pytest_chvm.base.choices import split_kernels
from pytest_chvm.guest.initramfs import find_busybox
from pytest_chvm.guest.kernels.config import config_of
from pytest_chvm.guest.kernels.find import find_kernel, kernel_ids
from pytest_chvm.guest.kernels.modules import module_files, modules_in_order
from pytest_chvm.guest.kernels.packing import PackingError, unpack
from pytest_chvm.model import architecture

RELEASE = "6.9.0-test"
ARM64 = bytes(56) + b"ARM\x64" + bytes(5000)


def bzimage(release=RELEASE):
    image = bytearray(4096)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = (0x400).to_bytes(2, "little")
    text = f"{release} (me@host) #1".encode()
    image[0x600 : 0x600 + len(text)] = text
    return bytes(image)


def module(name, release=RELEASE, depends=""):
    info = [f"depends={depends}", f"name={name}", f"vermagic={release} SMP mod_unload "]
    return b"\x7fELF" + bytes(60) + b"\0" + b"\0".join(map(str.encode, info)) + b"\0"


def put(path, data=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.fixture
def find(tmp_path):
    def found(name, arch="x86_64"):
        return find_kernel(Path(name), tmp_path / "cache", lambda text: None, architecture(arch))

    return found


def lz4_legacy(data):
    blocks = [lz4.block.compress(data[at : at + (8 << 20)], store_size=False) for at in range(0, len(data), 8 << 20)]
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(block)) + block for block in blocks) + struct.pack("<I", len(data))


def lzop(data):
    busybox = find_busybox(Path("/nonexistent"), print)
    return subprocess.run([busybox, "lzop", "-c"], input=data, capture_output=True, check=True).stdout


def zboot(data):
    # drivers/firmware/efi/libstub/zboot-header.S
    header = b"MZ\0\0zimg" + struct.pack("<II", 64, len(data)) + bytes(8) + b"gzip".ljust(32, b"\0") + bytes(8)
    return header + data + bytes(100)


PACKERS = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "bz2": bz2.compress,
    "zst": zstandard.ZstdCompressor().compress,
    "lz4": lz4.frame.compress,
    "lz4 of the kernel's build": lz4_legacy,
    "lzo": lzop,
    "zboot": zboot,
    "zboot of gz": lambda data: zboot(gzip.compress(data)),
}


@pytest.mark.parametrize("how", PACKERS)
def test_a_compressed_kernel_is_unpacked_and_has_what_is_beside_its_file(tmp_path, find, how):
    file = put(tmp_path / "boot" / "vmlinuz.packed", PACKERS[how](bzimage()))
    put(tmp_path / "boot" / f"config-{RELEASE}", "CONFIG_BPF_LSM=y\n")
    put(tmp_path / "lib/modules" / RELEASE / "kernel/a.ko", module("a"))
    kernel = find(file)
    assert kernel.image.read_bytes() == bzimage()
    assert (kernel.file, kernel.release, kernel.arch) == (file, RELEASE, "x86_64")
    assert kernel.modules_dir == tmp_path / "lib/modules" / RELEASE
    assert config_of(kernel)["BPF_LSM"] == "y"
    # The same file again is the same image; another one of its name is not.
    assert find(file).image == kernel.image
    file.write_bytes(PACKERS[how](bzimage("6.9.1-other")))
    assert find(file).release == "6.9.1-other"


@pytest.mark.parametrize("how", PACKERS)
def test_a_compressed_kernel_that_is_cut_off_or_none_is_refused(tmp_path, find, how):
    whole = PACKERS[how](bzimage())
    file = put(tmp_path / "vmlinuz", whole[: len(whole) // 2])
    with pytest.raises(InvalidConfigError, match=r"vmlinuz' is packed \([A-Za-z0-9 ]+\), and cannot be unpacked: "):
        find(file)
    file.write_bytes(PACKERS[how](b"#!/bin/sh\n" * 100))
    with pytest.raises(InvalidConfigError, match=r"what is packed \(.*\) in the kernel '.*/vmlinuz' is not a kernel"):
        find(file)
    file.write_bytes(PACKERS[how](ARM64))
    with pytest.raises(InvalidConfigError, match="is a arm64 Image for aarch64, and this machine is x86_64"):
        find(file)
    assert find(file, "aarch64").arch == "aarch64"
    assert [path.name for path in (tmp_path / "cache/kernels/unpacked").iterdir() if path.name.startswith(".")] == []


@given(
    st.sampled_from(
        [
            b"\x1f\x8b",
            b"\xfd7zXZ\0",
            b"\x5d\0\0",
            b"BZh",
            b"\x28\xb5\x2f\xfd",
            b"\x04\x22\x4d\x18",
            b"\x02\x21\x4c\x18",
            b"MZ\0\0zimg",
        ]
    ),
    st.binary(max_size=200),
)
def test_any_damage_of_what_is_compressed_is_an_error_in_words(magic, rest):
    with suppress(PackingError):
        unpack(magic + rest, lambda: Path("/bin/false"))


@pytest.mark.parametrize("how", ["gz", "xz", "lzma", "bz2", "zst", "lz4 of the kernel's build"])
def test_a_bzimage_with_a_damaged_kernel_in_it_is_refused(tmp_path, find, how):
    payload = PACKERS[how](os.urandom(5000)) + struct.pack("<I", 5000) * ("lz4" not in how)
    head = bytearray(bzimage().ljust(0x1000, b"\0"))
    head[0x1F1] = 7
    head[0x248:0x250] = struct.pack("<II", 0, len(payload))
    file = put(tmp_path / "whole", bytes(head) + payload)
    assert find(file).release == RELEASE
    damaged = put(tmp_path / "damaged", bytes(head) + payload[:2000] + bytes(2000) + payload[4000:])
    # The others have no checksum of what they unpack.
    if how in ("gz", "xz", "bz2"):
        with pytest.raises(InvalidConfigError, match="damaged' is damaged: what it unpacks when it boots cannot be unpacked"):
            find(damaged)
    head[0x248:0x250] = struct.pack("<II", 0, len(payload) - 1000)
    put(damaged, bytes(head) + payload[:-1000])
    with pytest.raises(InvalidConfigError, match="is damaged"):
        find(damaged)


def test_a_file_that_is_not_there_is_missing_and_one_that_is_no_file_is_wrong(tmp_path, find):
    with pytest.raises(MissingRequirementError, match=r"kernel '.*/none' does not exist"):
        find(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidConfigError, match="is a pipe"):
        find(tmp_path / "pipe")


@pytest.fixture(params=["fs/ext4/ext4.ko", "kernel/fs/ext4/ext4.ko", "fs/ext4/ext4.o"])
def tree(request, tmp_path):
    """What `make` leaves, as of different kernels."""
    tree = tmp_path / "linux"
    put(tree / "Makefile")
    put(tree / "Kconfig")
    put(tree / ".config", "CONFIG_EXT4_FS=m\n")
    put(tree / "include/config/kernel.release", f"{RELEASE}\n")
    put(tree / "arch/x86/boot/bzImage", bzimage())
    put(tree / "modules.order", f"{request.param}\n{request.param.replace('ext4', 'jbd2')}\ngone/gone.ko\n")
    put(tree / "fs/ext4/ext4.ko", module("ext4", depends="jbd2"))
    put(tree / "fs/jbd2/jbd2.ko", module("jbd2"))
    return tree


def test_a_build_tree_has_its_image_its_modules_and_its_configuration(tree, find):
    kernel = find(tree)
    assert (kernel.image, kernel.release, kernel.modules_dir) == (tree / "arch/x86/boot/bzImage", RELEASE, tree)
    assert module_files(tree) == {"ext4": tree / "fs/ext4/ext4.ko", "jbd2": tree / "fs/jbd2/jbd2.ko"}
    assert [each.name for each in modules_in_order(tree, ["ext4"])] == ["jbd2", "ext4"]
    assert config_of(kernel)["EXT4_FS"] == "m"


def test_the_image_in_a_build_tree_has_the_tree_s_modules(tree, find):
    assert find(tree / "arch/x86/boot/bzImage").modules_dir == tree
    put(tree / "include/config/kernel.release", "6.9.0-configured-anew\n")
    assert find(tree / "arch/x86/boot/bzImage").modules_dir is None


def test_the_directory_of_a_build_s_output_is_a_tree_too(tree, find):
    (tree / "Kconfig").unlink()
    assert find(tree).modules_dir == tree


def test_a_tree_whose_kernel_has_no_modules_is_right(tree, find):
    (tree / "modules.order").write_text("")
    assert find(tree).modules_dir is None


def test_a_tree_that_was_not_built_or_for_another_machine_is_refused(tree, find):
    with pytest.raises(
        InvalidConfigError, match=r"none was built for aarch64: expected .*; it has arch/x86/boot/bzImage for x86_64"
    ):
        find(tree, "aarch64")
    (tree / "arch/x86/boot/bzImage").unlink()
    with pytest.raises(InvalidConfigError, match=r"linux' is a build tree in which none was built for x86_64: .* Run 'make'"):
        find(tree)


def test_modules_of_another_release_are_refused(tree, tmp_path, find):
    put(tree / "fs/ext4/ext4.ko", module("ext4", "6.8.0-old"))
    with pytest.raises(
        InvalidConfigError, match=r"of another release than their kernel: ext4.ko is for 6.8.0-old, and the kernel is 6.9.0-test"
    ):
        find(tree)
    file = put(tmp_path / "boot/vmlinuz", bzimage())
    put(tmp_path / "lib/modules" / RELEASE / "kernel/fs/a.ko.xz", lzma.compress(module("a", "6.8.0-old")))
    with pytest.raises(InvalidConfigError, match=r"a.ko.xz is for 6.8.0-old"):
        find(file)


@pytest.mark.parametrize("boot", ["", "boot/"])
def test_what_make_install_and_modules_install_wrote(tmp_path, find, boot):
    root = tmp_path / "root"
    put(root / f"{boot}vmlinuz-{RELEASE}", bzimage())
    put(root / f"{boot}vmlinuz-{RELEASE}.old", bzimage())
    put(root / f"{boot}config-{RELEASE}", "CONFIG_BPF_LSM=y\n")
    put(root / f"lib/modules/{RELEASE}/kernel/a.ko", module("a"))
    for place in (root, root / boot):
        kernel = find(place)
        assert (kernel.image.name, kernel.modules_dir) == (f"vmlinuz-{RELEASE}", root / "lib/modules" / RELEASE)
        assert config_of(kernel)["BPF_LSM"] == "y"


def test_of_several_kernels_in_a_container_s_root_the_newest_is_taken(tmp_path, find):
    root = tmp_path / "root"
    for release in ("6.9.2-x", "6.10.0-x", "6.9.10-x"):
        put(root / f"boot/vmlinuz-{release}", bzimage(release))
        put(root / f"lib/modules/{release}/kernel/a.ko", module("a", release))
    # Its target is what the container has there, not the host.
    (root / "boot/vmlinuz").symlink_to("/boot/vmlinuz-6.9.2-x")
    assert find(root).release == "6.10.0-x"


def test_a_kernel_beside_its_modules_is_found_and_by_their_directory_too(tmp_path, find):
    modules = tmp_path / "root/usr/lib/modules" / RELEASE
    put(modules / "kernel/a.ko", module("a"))
    put(modules / "vmlinuz", bzimage())
    for place in (tmp_path / "root", modules, modules / "vmlinuz"):
        assert (find(place).image, find(place).modules_dir) == (modules / "vmlinuz", modules)


def test_a_directory_without_a_kernel_or_with_another_one_s_modules_is_refused(tmp_path, find):
    root = tmp_path / "root"
    put(root / "lib/modules/6.8.0-old/kernel/a.ko", module("a", "6.8.0-old"))
    with pytest.raises(
        InvalidConfigError, match=r"root' is a directory without one: expected a build tree, or .*, and modules of 6.8.0-old"
    ):
        find(root)
    put(root / f"boot/vmlinuz-{RELEASE}", bzimage())
    with pytest.raises(InvalidConfigError, match=r"they are of 6.8.0-old, and '.*vmlinuz-6.9.0-test' is 6.9.0-test"):
        find(root)


def test_the_host_s_kernel_is_found_or_it_is_said_why_not(find):
    release = os.uname().release
    images = [Path(f"/boot/vmlinuz-{release}"), Path(f"/lib/modules/{release}/vmlinuz")]
    if any(os.access(image, os.R_OK) for image in images):
        assert find("host").release == release
    else:
        with pytest.raises(MissingRequirementError, match=f"{release}, cannot be had: {images[0]}: not .*; {images[1]}: not "):
            find("host")


LISTED = """
linux-image-6.1.0-9-amd64 linux-image-6.1.0-50-amd64 linux-image-6.1.0-50-amd64-dbg linux-image-6.1.0-50-amd64-unsigned
linux-image-6.1.0-47-cloud-amd64 linux-image-6.1.0-50-rt-amd64 linux-image-6.1.0-51-rt-amd64 linux-image-6.1.0-99-arm64
linux-image-6.12.9+deb12-amd64 linux-image-6.12.111+deb12-amd64 linux-image-amd64 linux-image-6.12-amd64
"""


@pytest.fixture
def lists(tmp_path, monkeypatch):
    """A machine with package lists, whose packages have nothing but the kernel; returns the log of what was asked for."""
    programs, log = tmp_path / "programs", tmp_path / "log"
    listed = " ".join(LISTED.split())
    put(
        programs / "apt-cache",
        f"""#!/bin/sh
        case $1 in
        pkgnames) printf '%s\\n' {listed} ;;
        madison) shift; for name; do [ $name = linux-image-6.1.0-51-rt-amd64 ] || echo "$name | 1 | source"; done ;;
        esac""",
    )
    put(
        programs / "apt-get",
        f"#!/bin/sh\nfor name; do :; done\necho $name >>{log}\n[ -e {tmp_path}/offline ] && {{ echo E: no network >&2; exit 100; }}\ntouch $name.deb",
    )
    kernel = put(tmp_path / "packaged", bzimage())
    put(
        programs / "dpkg-deb",
        f"#!/bin/sh\nname=$(basename $2 .deb)\nmkdir $3/boot\ncp {kernel} $3/boot/vmlinuz-${{name#linux-image-}}",
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return log


@pytest.mark.parametrize(
    ("word", "package"),
    [
        ("debian:6.1", "linux-image-6.1.0-50-amd64"),
        ("debian:6.1-cloud", "linux-image-6.1.0-47-cloud-amd64"),
        ("debian:6.1-rt", "linux-image-6.1.0-50-rt-amd64"),
        ("debian:6.1.0-9", "linux-image-6.1.0-9-amd64"),
        ("debian:6.12", "linux-image-6.12.111+deb12-amd64"),
        ("debian:6.12.9", "linux-image-6.12.9+deb12-amd64"),
        ("debian:6.1.0-50-rt-amd64", "linux-image-6.1.0-50-rt-amd64"),
    ],
)
def test_the_newest_package_of_a_word_is_fetched_once(lists, find, word, package):
    assert find(word).image.name == package.replace("linux-image", "vmlinuz")
    find(word)
    assert lists.read_text().split() == [package]


@pytest.mark.parametrize(
    ("word", "error", "message"),
    [
        ("debian:5.10", MissingRequirementError, "no such package; this machine's package lists have debian:6.1, debian:6.1-cloud, debian:6.1-rt, debian:6.12"),
        ("debian:6.12-rt", MissingRequirementError, "no such package; this machine's"),
        ("debian:6.1-cluod", MissingRequirementError, "'debian:6.1-cluod': there is no such package"),
        ("debian:", InvalidConfigError, "expected debian:VERSION"),
        ("debian:6.1-arm64", InvalidConfigError, "is for arm64, and one for amd64 is needed"),
    ],
)  # fmt: skip
def test_a_word_for_no_package_is_refused_with_those_that_there_are(lists, find, word, error, message):
    with pytest.raises(error, match=message):
        find(word)
    assert not lists.exists()


def test_without_a_network_what_was_fetched_is_there_and_the_rest_is_missing(lists, tmp_path, find, monkeypatch):
    find("debian:6.1-cloud")
    put(tmp_path / "offline")
    assert find("debian:6.1-cloud").release == RELEASE
    with pytest.raises(
        MissingRequirementError, match=r"linux-image-6.1.0-50-amd64 cannot be fetched: apt-get failed .*E: no network"
    ):
        find("debian:6.1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingRequirementError, match="there is no apt here"):
        find_kernel(Path("debian:6.1"), tmp_path / "other", print, architecture("x86_64"))


def test_kernels_are_called_by_their_release_and_as_much_of_their_name_as_tells_them_apart(tmp_path, lists):
    one, two = put(tmp_path / "a/vmlinuz-1", bzimage()), put(tmp_path / "a/vmlinuz-2", bzimage())
    same = [put(tmp_path / name / "bzImage", bzimage("6.8.0-same")) for name in ("x", "y")]
    names = [one, tmp_path / "missing", two, *same, Path("debian:6.1"), Path("debian:5.10")]
    ids = kernel_ids(names, tmp_path / "cache", print, architecture("x86_64"))
    place = str(tmp_path).strip("/").replace("/", "-")
    assert ids == [
        f"{RELEASE}-vmlinuz-1", "missing", f"{RELEASE}-vmlinuz-2", f"6.8.0-same-{place}-x-bzImage", f"6.8.0-same-{place}-y-bzImage",
        "6.1.0-50-amd64", "debian:5.10",
    ]  # fmt: skip
    assert not lists.exists(), "a package was fetched for its name"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("/a:/b", ["/a", "/b"]),
        ("debian:6.1:/b:debian:6.12-cloud:host", ["debian:6.1", "/b", "debian:6.12-cloud", "host"]),
        (":/a::", ["/a"]),
        ("/x/debian:/b", ["/x/debian", "/b"]),
        ("debian:", ["debian:"]),
    ],
)
def test_a_package_s_colon_separates_no_kernels(text, names):
    assert split_kernels(text) == names


def test_a_real_kernel_compressed_anew_is_the_same_kernel(guest, find, tmp_path):
    file = tmp_path / "vmlinux.gz"
    with guest.kernel.open("rb") as plain, gzip.open(file, "wb", compresslevel=1) as packed:
        shutil.copyfileobj(plain, packed)
    assert find(file).release == find(guest.kernel).release

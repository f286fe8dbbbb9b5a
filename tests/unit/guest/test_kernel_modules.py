"""What is known of a kernel's modules before a VM is started: their files, their names, and the tree that modprobe reads."""

import gzip
import lzma
import os
import shutil
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pytest_chvm import InvalidConfigError
from pytest_chvm.guest.initramfs import find_busybox
from pytest_chvm.guest.kernels.kernel import Kernel
from pytest_chvm.guest.kernels.module_file import read_module
from pytest_chvm.guest.kernels.module_names import built_in_modules, modules_to_load
from pytest_chvm.guest.kernels.module_tree import ALIAS_FILE, module_image, module_tree
from pytest_chvm.model.modules import checked_modules, module_name
from tests.unit.guest.test_kernel_forms import RELEASE, module, put

PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
BUSYBOX = find_busybox(Path("/nonexistent"), print)


def kernel_with(modules_dir):
    return Kernel(image=modules_dir / "vmlinuz", release=RELEASE, modules_dir=modules_dir)


@pytest.fixture
def installed(tmp_path):
    """What `make modules_install` leaves, each module packed in another way."""
    modules = tmp_path / "root/lib/modules" / RELEASE
    put(modules / "kernel/fs/ext4.ko.xz", lzma.compress(module("ext4", depends="jbd2")))
    put(modules / "kernel/fs/jbd2.ko.gz", gzip.compress(module("jbd2")))
    put(modules / "kernel/net/dummy.ko.zst", PACKERS[".zst"](module("dummy")))
    put(modules / "kernel/net/own.ko", module("own"))
    put(modules / "extra/own.ko", module("own", depends="jbd2"))
    put(modules / "updates/dkms/new-one.ko", module("new_one"))
    put(modules / "modules.builtin", "kernel/fs/fat/vfat.ko\nkernel/lib/crc-t10dif.ko\n")
    return modules


@pytest.fixture
def built(tmp_path):
    """A tree in which a kernel was built, with two of the three modules that it could have."""
    tree = tmp_path / "linux"
    put(tree / "include/config/kernel.release", f"{RELEASE}\n")
    put(tree / "modules.order", "fs/ext4/ext4.ko\nfs/jbd2/jbd2.ko\n")
    put(tree / "modules.builtin", "fs/fat/vfat.ko\n")
    put(tree / "fs/ext4/ext4.ko", module("ext4", depends="jbd2"))
    put(tree / "fs/jbd2/jbd2.ko", module("jbd2"))
    put(tree / "drivers/md/Makefile", "dm-mod-y += dm.o\nobj-$(CONFIG_DM_FLAKEY)\t+= dm-flakey.o\n")
    put(tree / ".config", "CONFIG_EXT4_FS=m\n# CONFIG_DM_FLAKEY is not set\n")
    return tree


@pytest.mark.parametrize("packed", PACKERS)
def test_a_module_says_its_name_its_kernel_and_what_it_needs(tmp_path, packed):
    plain = module("own_one", depends="dm-mod,crc16")
    read = read_module(put(tmp_path / f"any-name.ko{packed}", PACKERS[packed](plain)))
    assert (read.name, read.release, read.needs, read.data) == ("own_one", RELEASE, ("dm_mod", "crc16"), plain)


@pytest.mark.parametrize("packed", PACKERS)
@given(
    data=st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(lambda data: b"\x7fELF\0" + data + b"\0name=a\0depends=,"))
)
def test_a_file_that_is_no_module_is_an_error_whatever_is_in_it(tmp_path_factory, packed, data):
    path = tmp_path_factory.getbasetemp() / f"hostile.ko{packed}"
    path.write_bytes(data)
    with pytest.raises(InvalidConfigError, match=r"is no kernel module|cannot be read"):
        read_module(path)


@given(at=st.integers(0, 10**6), packed=st.sampled_from([".gz", ".xz", ".zst"]))
def test_a_module_that_was_cut_is_refused_or_is_what_came(tmp_path_factory, at, packed):
    whole = PACKERS[packed](module("own"))
    path = tmp_path_factory.getbasetemp() / f"cut.ko{packed}"
    path.write_bytes(whole[: at % len(whole)])
    with pytest.raises(InvalidConfigError, match=r"is no kernel module|cannot be read"):
        read_module(path)


def test_a_name_that_could_be_a_path_or_an_option_is_no_module(tmp_path):
    for name in ("../../etc/passwd", "a b", "", "x" * 56):
        with pytest.raises(InvalidConfigError, match="is no kernel module"):
            read_module(put(tmp_path / "own.ko", module(name)))


@given(st.one_of(st.text(max_size=30), st.lists(st.one_of(st.text(max_size=30), st.integers(), st.none()), max_size=3)))
def test_modules_are_checked_whatever_is_asked_for(modules):
    try:
        checked = checked_modules("modules", modules)
    except InvalidConfigError:
        return
    for each in checked:
        assert "-" not in module_name(each)
        assert each.split() == each.split(" ")
    assert checked_modules("modules", list(checked)) == checked


def test_modules_are_found_by_either_spelling_by_alias_and_with_parameters(installed, tmp_path):
    aliases = put(tmp_path / ALIAS_FILE, "# Aliases\nalias fs-ext3 ext4\nalias pci:v00001AF4d*sv* own\nalias broken\n")
    kernel = kernel_with(installed)
    wanted = ["new-one", "new_one a=1", "vfat", "crc-t10dif", "fs-ext3", "dummy"]
    found = modules_to_load(wanted, kernel, aliases)
    # Not those that are built in; each keeps its place.
    assert found == {0: "new-one", 1: "new_one a=1", 4: "fs-ext3", 5: "dummy"}
    assert modules_to_load(["ext4"], kernel, tmp_path / "none") == {0: "ext4"}


def test_a_module_that_is_missing_is_said_with_those_that_are_near(installed, built, tmp_path):
    none = tmp_path / "none"
    with pytest.raises(InvalidConfigError, match=r"has no module 'dumy', neither in .* nor built in; did you mean dummy\?"):
        modules_to_load(["dumy"], kernel_with(installed), none)
    with pytest.raises(InvalidConfigError, match=r"'vfat' is built into .*cmdline_extra='vfat.a=1 vfat.b'"):
        modules_to_load(["vfat a=1 b"], kernel_with(installed), none)
    with pytest.raises(InvalidConfigError, match=r"no module 'dm_flakey'.*it is made by CONFIG_DM_FLAKEY, which is not set"):
        modules_to_load(["dm-flakey"], kernel_with(built), none)


def test_a_kernel_that_does_not_say_what_is_built_in_has_nothing_built_in(tmp_path):
    assert built_in_modules(tmp_path) == set()


@pytest.fixture(params=["depmod", "BusyBox"])
def indexed_by(request, monkeypatch):
    """Who writes the index that modprobe reads: kmod's depmod, or that of BusyBox where there is none."""
    if request.param == "BusyBox":
        monkeypatch.setattr("pytest_chvm.guest.kernels.module_tree.search_path", lambda: "/nonexistent")
    elif shutil.which("depmod", path=f"{os.environ['PATH']}:/sbin:/usr/sbin") is None:
        pytest.skip("depmod (package kmod) is not installed")
    return request.param


def test_a_tree_for_modprobe_has_each_module_unpacked_and_an_index(installed, tmp_path, indexed_by):
    del indexed_by
    tree = module_tree(kernel_with(installed), BUSYBOX, tmp_path / "cache", lambda text: None)
    assert (tree / "kernel/fs/ext4.ko").read_bytes() == module("ext4", depends="jbd2")
    assert (tree / "kernel/net/dummy.ko").read_bytes() == module("dummy")
    # Of two of one name the first is there, and nothing of the second.
    assert (tree / "extra/own.ko").exists()
    assert not (tree / "kernel/net/own.ko").exists()
    assert (tree / "updates/dkms/new-one.ko").exists()
    assert (tree / "modules.builtin").read_text().startswith("kernel/fs/fat/vfat.ko\n")
    assert (tree / "modules.dep").stat().st_size


def test_the_modules_of_a_build_are_where_they_are_when_installed(built, tmp_path):
    tree = module_tree(kernel_with(built), BUSYBOX, tmp_path / "cache", lambda text: None)
    assert os.readlink(tree / "kernel/fs/ext4/ext4.ko") == str(built / "fs/ext4/ext4.ko")
    dependencies = dict(line.split(":") for line in (tree / "modules.dep").read_text().splitlines())
    assert set(dependencies) == {"kernel/fs/ext4/ext4.ko", "kernel/fs/jbd2/jbd2.ko"}


def test_a_tree_is_made_once_for_each_state_of_the_modules(built, tmp_path):
    said = []
    first = [module_tree(kernel_with(built), BUSYBOX, tmp_path / "cache", said.append) for _ in range(2)]
    put(built / "fs/ext4/ext4.ko", module("ext4"))
    then = module_tree(kernel_with(built), BUSYBOX, tmp_path / "cache", said.append)
    assert first[0] == first[1] != then
    assert len(said) == 2


def test_a_disk_of_modules_is_an_ext4_with_room_for_all_of_them(installed, tmp_path):
    put(installed / "kernel/large.ko", module("large") + os.urandom(3 << 20))
    image = module_image(kernel_with(installed), BUSYBOX, tmp_path / "cache", lambda text: None)
    assert image.read_bytes()[1080:1082] == b"\x53\xef"
    assert image.with_name(ALIAS_FILE).exists()
    assert sorted(path.name for path in image.parent.iterdir()) == ["modules.alias", "modules.img"]


def test_a_damaged_module_of_a_kernel_s_own_is_said(installed, tmp_path):
    put(installed / "kernel/bad.ko.xz", b"not xz")
    with pytest.raises(InvalidConfigError, match=r"bad\.ko\.xz"):
        module_tree(kernel_with(installed), BUSYBOX, tmp_path / "cache", lambda text: None)

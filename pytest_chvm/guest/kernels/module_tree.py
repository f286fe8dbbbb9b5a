"""All modules of a kernel as `modprobe` looks for them, made once for each state of their files: a directory, and a disk with it.

Compressed modules are unpacked, since not every kernel and every modprobe can do that.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pytest_chvm.base.cache import built_once, keep_latest
from pytest_chvm.base.progress import Progress
from pytest_chvm.base.trees import remove_tree
from pytest_chvm.errors import HostError, MissingRequirementError
from pytest_chvm.guest.builders.tools import run_tool, search_path
from pytest_chvm.guest.kernels.kernel import Kernel
from pytest_chvm.guest.kernels.modules import ORDER_FILE, decompressed, is_build_tree, module_files

RECIPE = "3"
# What the build of a kernel leaves beside its modules, which depmod reads.
OF_BUILD = (ORDER_FILE, "modules.builtin", "modules.builtin.modinfo")
IMAGE_FILE = "modules.img"
# Of depmod, beside the image too.
ALIAS_FILE = "modules.alias"
BLOCK = 4096
# A kernel that is built again and again has other modules each time.
MOST_KEPT = 8
DEBUG_INFO = b".debug_info\0"


def module_image(kernel: Kernel, busybox: Path, cache: Path, progress: Progress) -> Path:
    """Return a disk image (ext4, to be mounted read-only) whose root is like `/lib/modules/RELEASE` of a kernel with modules.

    Its directory is named by the state of the modules' files. Raises MissingRequirementError where there is no mke2fs.
    """
    if shutil.which("mke2fs", path=search_path()) is None:
        raise MissingRequirementError("modprobe finds no modules in the guest: their disk is made with mke2fs (package e2fsprogs)")

    def build(directory: Path) -> None:
        progress(f"making a disk of the modules of kernel {kernel.release}")
        base = directory / "tree"
        tree = _fill(base, kernel, busybox, _copy)
        _make_image(tree, directory / IMAGE_FILE)
        shutil.copyfile(tree / ALIAS_FILE, directory / ALIAS_FILE)
        if failures := remove_tree(base):
            raise HostError("; ".join(failures))

    return _built("images", kernel, build, cache, progress) / IMAGE_FILE


def module_tree(kernel: Kernel, busybox: Path, cache: Path, progress: Progress) -> Path:
    """Return a directory like `/lib/modules/RELEASE` of a kernel with modules, for a guest that has the host's files: of links."""

    def build(directory: Path) -> None:
        progress(f"making an index of the modules of kernel {kernel.release}")
        _fill(directory, kernel, busybox, _link)

    return _built("trees", kernel, build, cache, progress) / "lib" / "modules" / _release(kernel)


def _release(kernel: Kernel) -> str:
    assert kernel.release is not None
    return kernel.release


def _built(kind: str, kernel: Kernel, build: Callable[[Path], None], cache: Path, progress: Progress) -> Path:
    assert kernel.modules_dir is not None
    key = hashlib.sha256(f"{RECIPE} {kernel.release} {kernel.modules_dir}".encode(errors="surrogateescape"))
    # What is in the cache stays as it is, and each process that starts a VM would look at a thousand files.
    is_kept = kernel.modules_dir.is_relative_to(cache)
    files = [] if is_kept else [*module_files(kernel.modules_dir).values(), *(kernel.modules_dir / name for name in OF_BUILD)]
    for file in files:
        with suppress(FileNotFoundError):
            found = file.stat()
            key.update(f"\n{file} {found.st_size} {found.st_mtime_ns}".encode(errors="surrogateescape"))
    used = built_once(cache / "modules" / kind / key.hexdigest()[:32], build, progress=progress)
    keep_latest(used, MOST_KEPT)
    return used


def _fill(base: Path, kernel: Kernel, busybox: Path, put: Callable[[Path, Path], None]) -> Path:
    """Make the directory of a kernel's modules, with its index, below a new base; returns it."""
    assert kernel.modules_dir is not None
    tree = base / "lib" / "modules" / _release(kernel)
    tree.mkdir(parents=True)
    # Where a depmod looks depends on the distribution that it is of.
    (base / "usr").symlink_to(".")
    for name in OF_BUILD:
        with suppress(FileNotFoundError):
            shutil.copyfile(kernel.modules_dir / name, tree / name)
    above = "kernel" if is_build_tree(kernel.modules_dir) else ""
    for file in module_files(kernel.modules_dir).values():
        place = tree / above / file.relative_to(kernel.modules_dir)
        place = place.with_name(place.name.split(".ko")[0] + ".ko")
        place.parent.mkdir(parents=True, exist_ok=True)
        put(file, place)
    depmod = shutil.which("depmod", path=search_path())
    run_tool([*([depmod] if depmod else [busybox, "depmod"]), "-b", base, _release(kernel)])
    return tree


def _link(file: Path, place: Path) -> None:
    if file.suffix == ".ko":
        place.symlink_to(os.path.realpath(file))
    else:
        place.write_bytes(decompressed(file))


def _copy(file: Path, place: Path) -> None:
    data = decompressed(file)
    place.write_bytes(data)
    # Of a kernel with debug information each module is ten times as large, and the guest does nothing with that.
    if DEBUG_INFO in data and (strip := shutil.which("strip")) is not None:
        run_tool([strip, "--strip-debug", place])


def _make_image(tree: Path, image: Path) -> None:
    sizes = [path.lstat().st_size for path in tree.rglob("*")]
    inodes = len(sizes) + 64
    # With what the file system needs for itself: its tables, and blocks of extents.
    blocks = sum(size // BLOCK + 1 for size in sizes) * 102 // 100 + inodes // 16 + 1024
    # Nothing of it needs a module of the kernel's, as checksums would.
    words = [
        "mke2fs",
        "-q",
        "-F",
        "-t",
        "ext4",
        "-O",
        "none,extent,filetype,sparse_super",
        "-b",
        str(BLOCK),
        "-I",
        "256",
        "-m",
        "0",
    ]
    run_tool([*words, "-N", str(inodes), "-E", "root_owner=0:0", "-L", "modules", "-d", tree, image, str(blocks)])

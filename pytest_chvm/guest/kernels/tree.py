"""A kernel named by the tree in which it was built, or by the directory that its build had for output (`O=`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pytest_chvm.base.progress import Progress
from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.guest.kernels.file import kernel_of_file
from pytest_chvm.guest.kernels.kernel import Kernel
from pytest_chvm.guest.kernels.modules import is_build_tree, module_files

# By machine what its builds make, first choice first (Documentation/kbuild, arch/*/boot/Makefile).
IMAGES = {
    "x86_64": ("arch/x86/boot/bzImage", "vmlinux"),
    "aarch64": ("arch/arm64/boot/Image", "arch/arm64/boot/Image.gz", "arch/arm64/boot/vmlinuz.efi"),
    "riscv64": ("arch/riscv/boot/Image", "arch/riscv/boot/Image.gz", "arch/riscv/boot/vmlinuz.efi"),
}


def is_tree(directory: Path) -> bool:
    """Tell whether a directory is a kernel's source or what was built of it, finished or not."""
    has_makefile = (directory / "Makefile").is_file()
    return (directory / "include/config/kernel.release").is_file() or (
        has_makefile and any((directory / name).is_file() for name in ("Kconfig", ".config"))
    )


def kernel_of_tree(tree: Path, cache: Path, progress: Progress, arch: str) -> Kernel:
    """Return the kernel that was built in a tree, with the modules that were; raises InvalidConfigError where none was.

    Its release is its image's own: that in the tree may be of a build that was not finished.
    """
    images = IMAGES.get(arch, ("vmlinux",))
    image = next((tree / name for name in images if (tree / name).is_file()), None)
    if image is None:
        others = [f"{name} for {other}" for other, names in IMAGES.items() for name in names if (tree / name).is_file()]
        but = f"; it has {', '.join(others)}" if others else ""
        raise InvalidConfigError(
            f"kernel {str(tree)!r} is a build tree in which none was built for {arch}: expected {' or '.join(images)}{but}."
            " Run 'make' there, or name the directory that the build had as O="
        )
    kernel = kernel_of_file(image, cache, progress, arch)
    has_modules = is_build_tree(tree) and bool(module_files(tree))
    return replace(kernel, modules_dir=tree if has_modules else None)

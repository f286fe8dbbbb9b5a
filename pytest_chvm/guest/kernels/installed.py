"""A kernel named by a directory into which one was installed.

What `make install` and `make modules_install` wrote there (INSTALL_PATH, INSTALL_MOD_PATH), an unpacked package, the root of a
container, or a directory of modules that has the kernel beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pytest_chvm.base.progress import Progress
from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.guest.images.boot_entries import newest
from pytest_chvm.guest.kernels.file import kernel_of_file
from pytest_chvm.guest.kernels.kernel import Kernel
from pytest_chvm.guest.kernels.modules import modules_of

MODULES_PLACES = ("lib/modules", "usr/lib/modules")


def kernel_of_directory(directory: Path, cache: Path, progress: Progress, arch: str) -> Kernel:
    """Return the newest kernel that was installed in a directory; raises InvalidConfigError where there is none.

    Its modules are those of its release there; where there are only those of others, that is an error too.
    """
    images = [path for path in _candidates(directory) if path.is_file()]
    # A link like `boot/vmlinuz` has no version in its name, and may lead to what is there outside the container.
    image = newest(map(str, [path for path in images if not path.is_symlink()] or images))
    releases = sorted({path.name for place in _module_places(directory) for path in place.iterdir() if path.is_dir()})
    if image is None:
        has = f", and modules of {', '.join(releases)}" if releases else ""
        raise InvalidConfigError(
            f"kernel {str(directory)!r} is a directory without one: expected a build tree, or vmlinuz-RELEASE in it, in its boot/ "
            f"or beside the modules in its lib/modules/RELEASE/{has}. 'make install INSTALL_PATH=DIR' puts it there"
        )
    kernel = kernel_of_file(Path(image), cache, progress, arch)
    own = next((tree for root in _roots(directory) if (tree := modules_of(root, kernel.release)) is not None), None)
    if own is None and releases:
        raise InvalidConfigError(
            f"the modules in {str(directory)!r} are of another release than its kernel: they are of {', '.join(releases)}, and "
            f"{image!r} is {kernel.release}; install both ('make modules_install install'), or name the kernel's file alone"
        )
    return replace(kernel, modules_dir=own or kernel.modules_dir)


def _candidates(directory: Path) -> Iterator[Path]:
    for place in (directory, directory / "boot", *(tree for each in _module_places(directory) for tree in sorted(each.iterdir()))):
        for pattern in ("vmlinu[xz]*", "bzImage*", "Image*"):
            yield from sorted(place.glob(pattern))


def _module_places(directory: Path) -> list[Path]:
    found = (root / place for root in _roots(directory) for place in MODULES_PLACES)
    return list({path.resolve(): path for path in found if path.is_dir()}.values())


def _roots(directory: Path) -> tuple[Path, ...]:
    # INSTALL_PATH=ROOT/boot with INSTALL_MOD_PATH=ROOT, and /lib/modules/RELEASE itself.
    return (directory, *([directory.parent] if directory.name == "boot" else []))

"""Which kernel a user means: what `--chvm-kernel` and `kernel=` take, and what it is called in a test's id.

A form is a file of this folder: an image (`file`), a build tree (`tree`), a directory into which a kernel was installed
(`installed`), the host's (`host`), a package (`package`). Words for kernels are in `base.choices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pytest_chvm.base.choices import HOST_KERNEL, is_kernel_word
from pytest_chvm.base.progress import Progress
from pytest_chvm.errors import VmError
from pytest_chvm.guest.kernels.file import kernel_of_file
from pytest_chvm.guest.kernels.kernel import Kernel
from pytest_chvm.guest.kernels.modules import check_release
from pytest_chvm.model import Architecture, architecture


def find_kernel(name: Path, cache: Path, progress: Progress, arch: Architecture | None = None) -> Kernel:
    """Return the kernel that a user has named, by a path or a word; a package is fetched.

    `arch` is the architecture that it is for (None: this machine's). Raises InvalidConfigError for what is no kernel, one for
    another machine, a tree that was not built, or modules of another release; MissingRequirementError where this machine does not
    have it: no such file or package, or it cannot be read.
    """
    kernel = _found(name, cache, progress, arch or architecture(None))
    if kernel.modules_dir is not None and kernel.release is not None:
        check_release(kernel.modules_dir, kernel.release)
    return kernel


def _found(name: Path, cache: Path, progress: Progress, arch: Architecture) -> Kernel:
    # Imported is what this form needs: each process that starts a VM does so.
    if name == Path(HOST_KERNEL):
        from pytest_chvm.guest.kernels.host import host_image

        name = host_image()
    elif is_kernel_word(str(name)):
        from pytest_chvm.guest.kernels.package import image_of_package

        name = image_of_package(str(name), cache, progress, arch)
    elif name.is_dir():
        from pytest_chvm.guest.kernels.installed import kernel_of_directory
        from pytest_chvm.guest.kernels.tree import is_tree, kernel_of_tree

        return (kernel_of_tree if is_tree(name) else kernel_of_directory)(name, cache, progress, arch.name)
    return kernel_of_file(name, cache, progress, arch.name)


def kernel_ids(names: Sequence[Path], cache: Path, progress: Progress, arch: Architecture | None = None) -> list[str]:
    """Return what each of several kernels is called: its release, with as much of its name as tells it from the others.

    One that cannot be had is called as it was named. No package is fetched for it.
    """
    releases = [_release(name, cache, progress, arch or architecture(None)) for name in names]
    short = [_joined(release, name.name) for release, name in zip(releases, names, strict=True)]
    whole = [_joined(release, str(name).strip("/")) for release, name in zip(releases, names, strict=True)]
    chosen = [release or name.name for release, name in zip(releases, names, strict=True)]
    for longer in (short, whole):
        chosen = [longer[at] if chosen.count(each) > 1 else each for at, each in enumerate(chosen)]
    return chosen


def _joined(release: str | None, name: str) -> str:
    text = name.replace("/", "-")
    return f"{release}-{text}" if release else text


def _release(name: Path, cache: Path, progress: Progress, arch: Architecture) -> str | None:
    with suppress(VmError, OSError):
        if is_kernel_word(str(name)) and name != Path(HOST_KERNEL):
            from pytest_chvm.guest.kernels.package import package_of

            return package_of(str(name), cache, progress, arch).release
        return _found(name, cache, progress, arch).release
    return None

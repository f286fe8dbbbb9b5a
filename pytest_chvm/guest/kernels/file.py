"""A kernel named by a file: an image that a VMM boots, or one that is compressed or wrapped for EFI, unpacked into the cache."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pytest_chvm.base.cache import built_once, keep_latest
from pytest_chvm.base.progress import Progress
from pytest_chvm.errors import HostError, InvalidConfigError, MissingRequirementError
from pytest_chvm.guest.kernels.image import check_kernel_image
from pytest_chvm.guest.kernels.kernel import Kernel, inspect_kernel
from pytest_chvm.guest.kernels.modules import find_modules
from pytest_chvm.guest.kernels.packing import PackingError, is_zboot, packed_with, unpack
from pytest_chvm.guest.kernels.unpacked import is_damaged

# Of unpacked kernels, some 50 MB each.
MOST_KEPT = 32
# Empty directories.
MOST_CHECKED = 1000


def kernel_of_file(file: Path, cache: Path, progress: Progress, arch: str) -> Kernel:
    """Return the kernel in a file; raises InvalidConfigError for what is none, or one that no VMM for `arch` boots."""
    if not file.exists():
        raise MissingRequirementError(f"kernel {str(file)!r} does not exist")
    if not file.is_file() and not file.is_block_device():
        raise InvalidConfigError(f"kernel {str(file)!r} is a pipe, socket or character device, expected a file")
    if not os.access(file, os.R_OK):
        raise MissingRequirementError(f"kernel {str(file)!r} cannot be read by you")
    with file.open("rb") as opened:
        head = opened.read(16)
    how = "EFI zboot" if is_zboot(head) else packed_with(head)
    if how is None:
        if check_kernel_image(file, arch).format == "bzImage":
            _check_payload(file, cache, progress)
        return inspect_kernel(file)
    image = _unpacked(file, how, cache, progress, arch)
    kernel = inspect_kernel(image)
    return replace(kernel, packed=file, modules_dir=find_modules(file, kernel.release))


def _check_payload(image: Path, cache: Path, progress: Progress) -> None:
    """Raise InvalidConfigError where what a bzImage unpacks when it boots is damaged; each is looked at once."""

    def build(_directory: Path) -> None:
        if is_damaged(image):
            raise InvalidConfigError(
                f"kernel {str(image)!r} is damaged: what it unpacks when it boots cannot be unpacked; copy or build it again"
            )

    # Without a cache it shows when it boots.
    with suppress(HostError):
        keep_latest(built_once(cache / "kernels" / "checked" / _key(image), build, progress=progress), MOST_CHECKED)


def _key(file: Path) -> str:
    found = file.stat()
    return hashlib.sha256(f"{file}\0{found.st_size}\0{found.st_mtime_ns}".encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _unpacked(file: Path, how: str, cache: Path, progress: Progress, arch: str) -> Path:
    def busybox() -> Path:
        from pytest_chvm.guest.initramfs import find_busybox

        return find_busybox(cache, progress)

    def build(directory: Path) -> None:
        image = directory / "kernel"
        try:
            image.write_bytes(unpack(file.read_bytes(), busybox))
        except PackingError as error:
            raise InvalidConfigError(f"kernel {str(file)!r} is packed ({how}), and cannot be unpacked: {error}") from error
        check_kernel_image(image, arch, called=f"what is packed ({how}) in the kernel {str(file)!r}")

    place = built_once(cache / "kernels" / "unpacked" / f"{_key(file)}-{arch}", build, progress=progress)
    keep_latest(place, MOST_KEPT)
    return place / "kernel"

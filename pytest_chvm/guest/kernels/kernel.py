"""`Kernel`: what is known of a guest's kernel, from whatever it came.

`find.find_kernel` makes one of what a user names (`--chvm-kernel`, `kernel=`), and `default.default_kernel` that of the built-in
guest; `inspect_kernel` one of a plain image. How it was configured is asked of `config.config_of`, its files of modules of
`modules.module_files`, a `vmlinux` with its debug information of `guest.symbols.debug_kernel`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.guest.kernels.image import check_kernel_image, machine_of
from pytest_chvm.guest.kernels.modules import find_modules
from pytest_chvm.model import Architecture, architecture


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel: the image that a VMM is given, its release as `uname -r` says it (None: it does not say), and its modules.

    `modules_dir` is a directory like `/lib/modules/RELEASE`, which may have no `modules.dep` yet, or the tree in which the kernel
    was built, of which `modules.order` names the modules: `modules.module_files` knows both (None: none were found). `arch` is
    named as `platform.machine()` does it. `packed` is the compressed file that `image` was unpacked from, if any.
    """

    image: Path
    release: str | None
    modules_dir: Path | None
    arch: str = "x86_64"
    packed: Path | None = None

    @property
    def file(self) -> Path:
        """The file as it is kept: what belongs to the kernel, like its configuration, is beside that."""
        return self.packed or self.image

    @property
    def architecture(self) -> Architecture:
        """The processor architecture that it is for."""
        return architecture(self.arch)


def inspect_kernel(image: Path) -> Kernel:
    """Return what is known of a kernel image; raises InvalidConfigError where the file is none.

    Whether a VMM can boot it is for `image.check_kernel_image` to say.
    """
    try:
        with image.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise InvalidConfigError(f"kernel {str(image)!r} cannot be read: {error.strerror}") from error
    release = None
    if head[0x202:0x206] == b"HdrS":
        release = _bzimage_release(image, head)
    elif machine_of(head) is not None:
        release = _banner_release(image)
    else:
        check_kernel_image(image)
    return Kernel(image, release, find_modules(image, release), machine_of(head) or "x86_64")


def _bzimage_release(image: Path, head: bytes) -> str | None:
    # boot.rst, kernel_version: offset, less 0x200, of a NUL-terminated string whose first word is the release.
    offset = int.from_bytes(head[0x20E:0x210], "little")
    if offset == 0:
        return None
    with image.open("rb") as file:
        file.seek(offset + 0x200)
        text = file.read(256)
    words = text.split(b"\0")[0].split()
    return words[0].decode(errors="replace") if words else None


def _banner_release(image: Path) -> str | None:
    with image.open("rb") as file:
        overlap = b""
        while chunk := file.read(1 << 20):
            if match := re.search(rb"Linux version (\d[^\s\0]{0,127}) ", overlap + chunk):
                return match[1].decode(errors="replace")
            overlap = chunk[-256:]
    return None

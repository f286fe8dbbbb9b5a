"""What is put in front of a stock image: an initramfs that finds its root, and leaves in its `/run` what the host needs."""

from __future__ import annotations

import stat
from importlib import resources
from pathlib import Path

from pytest_chvm.base.progress import Progress
from pytest_chvm.guest.images.inspect import MODULES, MODULES_OF, System
from pytest_chvm.guest.initramfs import Entry, build_initramfs
from pytest_chvm.guest.kernels.kernel import Kernel

UNITS = ("chvm-console.service", "chvm-ready.service", "chvm-setup.service")


def initramfs_in_front(system: System, kernel: Kernel, cache: Path, progress: Progress) -> Path:
    """Return the initramfs for an image's system, with the kernel's modules; raises what `build_initramfs` does."""
    files, images = resources.files("pytest_chvm.guest"), resources.files(__package__)
    more = [
        Entry("lib/chvm/root", stat.S_IFREG | 0o644, f"{system.device} {system.type} {system.options}\n".encode()),
        Entry("lib/chvm/configure_any.sh", stat.S_IFREG | 0o644, files.joinpath("configure_any.sh").read_bytes()),
        Entry("lib/chvm/stock.sh", stat.S_IFREG | 0o644, images.joinpath("stock.sh").read_bytes()),
        Entry("lib/chvm/units", stat.S_IFDIR | 0o755),
        *(Entry(f"lib/chvm/units/{name}", stat.S_IFREG | 0o644, images.joinpath("units", name).read_bytes()) for name in UNITS),
    ]
    wanted = (*MODULES, *MODULES_OF.get(system.type, ()))
    return build_initramfs(kernel, cache, progress, init_script="images/init.sh", wanted=wanted, more=more)

"""The kernel of the built-in guest: one that the distribution makes for VMs, else the host's own."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pytest_chvm.base.cache import built_once
from pytest_chvm.base.progress import Progress
from pytest_chvm.errors import MissingRequirementError
from pytest_chvm.guest.kernels.kernel import Kernel, inspect_kernel
from pytest_chvm.guest.packages import PackageError, apt_cache, download_and_unpack

# Packages whose kernel is made for VMs, first choice first; the first that the machine's package lists know is taken.
KERNEL_PACKAGES = {
    "x86_64": ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64"),
}


def default_kernel(cache: Path, machine: str, progress: Progress) -> Kernel:
    """Return the kernel of the built-in guest: one from a package, else the host's own where readable.

    Raises InvalidConfigError that says what to do where there is neither.
    """
    refused = []
    cached = sorted((cache / "packages").glob("linux-*/boot/vmlinu*"))
    if cached:
        return inspect_kernel(cached[0])
    for package in KERNEL_PACKAGES.get(machine, ()):
        try:
            tree = fetch_kernel_package(package, cache, progress)
        except PackageError as error:
            refused.append(f"{package}: {error}")
            continue
        for image in sorted((tree / "boot").glob("vmlinu*")):
            return inspect_kernel(image)
    release = os.uname().release
    for own in (Path(f"/boot/vmlinuz-{release}"), Path(f"/lib/modules/{release}/vmlinuz")):
        if os.access(own, os.R_OK):
            return inspect_kernel(own)
        refused.append(f"{own}: {'not readable by you' if own.exists() else 'not there'}")
    raise MissingRequirementError(
        "no kernel for the built-in guest: " + "; ".join(refused) + ". Name one with --chvm-kernel=PATH, or on Debian "
        "and Ubuntu run 'apt-get update' so that one can be fetched"
    )


def fetch_kernel_package(package: str, cache: Path, progress: Progress) -> Path:
    """Return the unpacked tree of the kernel a metapackage stands for, downloaded at the first call.

    Raises PackageError where the distribution has no such package or it cannot be downloaded.
    """
    needed = _real_kernel_packages(package)

    def build(directory: Path) -> None:
        for name in needed:
            download_and_unpack(name, directory, progress)
        if not list((directory / "boot").glob("vmlinu*")):
            raise PackageError(f"no kernel image in {', '.join(needed)}")

    return built_once(cache / "packages" / needed[0], build, progress=progress)


def _real_kernel_packages(package: str) -> list[str]:
    """Return the image package behind a metapackage, and on Ubuntu the one that has its modules."""
    found: list[str] = []
    pending = [package]
    while pending and len(found) < 4:
        name = pending.pop(0)
        depends = re.findall(r"^\s*Depends: (linux-(?:image|modules)-\S+)$", apt_cache("depends", name), re.M)
        if re.match(r"linux-(image|modules)-\d", name):
            found.append(name)
        pending += [d for d in depends if d not in found and d not in pending]
    if not found:
        raise PackageError("this machine's package lists do not know it")
    return found

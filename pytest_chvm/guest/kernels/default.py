"""The kernel of the built-in guest: one that the distribution makes for VMs, else the host's own."""

from __future__ import annotations

import re
from pathlib import Path

from pytest_chvm.base.progress import Progress
from pytest_chvm.errors import MissingRequirementError
from pytest_chvm.guest.kernels.host import host_image
from pytest_chvm.guest.kernels.kernel import Kernel, inspect_kernel
from pytest_chvm.guest.packages import PackageError, apt_cache, apt_options, fetch_packages, packages_dir
from pytest_chvm.model import Architecture, architecture

# Packages whose kernel is made for VMs, first choice first; the first that the machine's package lists know is taken.
KERNEL_PACKAGES = {
    "x86_64": ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64"),
    "aarch64": ("linux-image-cloud-arm64", "linux-image-virtual", "linux-image-arm64"),
    "riscv64": ("linux-image-riscv64", "linux-image-virtual"),
}


def default_kernel(cache: Path, arch: Architecture, progress: Progress) -> Kernel:
    """Return the kernel of the built-in guest of an architecture: one from a package, else the host's own where readable.

    Raises InvalidConfigError that says what to do where there is neither.
    """
    refused = []
    cached = sorted(packages_dir(cache, arch).glob("linux-*/boot/vmlinu*"))
    if cached:
        return inspect_kernel(cached[0])
    for package in KERNEL_PACKAGES.get(arch.name, ()):
        try:
            tree = fetch_kernel_package(package, cache, progress, arch)
        except PackageError as error:
            refused.append(f"{package}: {error}")
            continue
        for image in sorted((tree / "boot").glob("vmlinu*")):
            return inspect_kernel(image)
    if arch.is_host:
        try:
            return inspect_kernel(host_image())
        except MissingRequirementError as error:
            refused.append(str(error))
    raise MissingRequirementError(
        f"no kernel{'' if arch.is_host else f' of {arch.name}'} for the built-in guest: "
        + "; ".join(refused)
        + ". Name one with "
        + (
            "--chvm-kernel=PATH, or on Debian and Ubuntu run 'apt-get update' so that one can be fetched"
            if arch.is_host
            else "kernel="
        )
    )


def fetch_kernel_package(package: str, cache: Path, progress: Progress, arch: Architecture | None = None) -> Path:
    """Return the unpacked tree of the kernel a metapackage stands for, downloaded at the first call.

    `arch` is its architecture (None: this machine's).

    Raises PackageError where the distribution has no such package or it cannot be downloaded.
    """
    arch = arch or architecture(None)
    needed = _real_kernel_packages(package, cache, progress, arch)
    return fetch_packages(needed, packages_dir(cache, arch) / needed[0], cache, progress, arch, expected="boot/vmlinu*")


def _real_kernel_packages(package: str, cache: Path, progress: Progress, arch: Architecture) -> list[str]:
    """Return the image package behind a metapackage, and on Ubuntu the one that has its modules."""
    options = apt_options(arch, cache, progress)
    found: list[str] = []
    pending = [package]
    while pending and len(found) < 4:
        name = pending.pop(0)
        depends = re.findall(r"^\s*Depends: (linux-(?:image|modules)-\S+)$", apt_cache(*options, "depends", name), re.M)
        if re.match(r"linux-(image|modules)-\d", name):
            found.append(name)
        pending += [d for d in depends if d not in found and d not in pending]
    if not found:
        raise PackageError("this machine's package lists do not know it")
    return found

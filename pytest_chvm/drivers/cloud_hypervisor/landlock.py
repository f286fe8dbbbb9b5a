"""Landlock for Cloud Hypervisor: the kernel keeps the VMM to the files that its VM has.

It allows the paths of its configuration itself (vmm/src/vm_config.rs); the others that it opens are listed here.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from pytest_chvm.drivers.boot import Boot
from pytest_chvm.drivers.disks import backing_files
from pytest_chvm.drivers.taps import AttachedTap

# Cloud Hypervisor refuses to start with less (vmm/src/landlock.rs); Linux 6.2 has it.
NEEDED_ABI = 3
# include/uapi/asm-generic/unistd.h, include/uapi/linux/landlock.h
LANDLOCK_CREATE_RULESET, CREATE_RULESET_VERSION = 444, 1


@lru_cache(maxsize=1)
def landlock_abi() -> int:
    """Return the kernel's version of Landlock, 0 where it has none or it is off (landlock_create_ruleset(2))."""
    import ctypes

    version: int = ctypes.CDLL(None).syscall(
        ctypes.c_long(LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint32(CREATE_RULESET_VERSION)
    )
    return max(version, 0)


def is_confined(boot: Boot) -> bool:
    """Tell whether a VM's VMM is confined: not where devices may be plugged in later, whose paths are not known yet.

    Nor for a template, whose final place is not known.
    """
    is_template = boot.memory is not None and boot.restoring is None
    return not boot.config.hotplug and not is_template and landlock_abi() >= NEEDED_ABI


def rules(boot: Boot, taps: list[AttachedTap]) -> list[tuple[Path, str]]:
    """Return the paths that the VMM opens beside those of its configuration, each with its access, `r` or `rw`."""
    # Its own directory is for the sockets of vsock.
    found = [(boot.lease.directory, "rw")]
    found += [(boot.options.snapshots, "rw")] if boot.options.snapshots is not None else []
    # What it is restored from is linked to from its own directory.
    found += [(boot.restoring, "r")] if boot.restoring is not None else []
    # An overlay of ours is on top of the root disk, and is a path of the configuration.
    for disk in boot.config.disks_with_images:
        images = [*([disk.image] if disk.kind.throwaway else []), *backing_files(disk.image)]
        found += [(image, "r") for image in images]
    # Whether it has several queues (net_util/src/open_tap.rs).
    found += [(Path("/sys/devices/virtual/net", tap.name), "r") for tap in taps]
    return found

"""Checks, before anything is started, that this host has what a VM asks for."""

from __future__ import annotations

import os
from pathlib import Path

from pytest_chvm.errors import HostError, InvalidConfigError, MissingRequirementError
from pytest_chvm.guest.kernels.image import check_kernel_image
from pytest_chvm.host.hugepages import check_hugepages
from pytest_chvm.host.limits import memory_limit
from pytest_chvm.host.namespaces import check_netns
from pytest_chvm.model import VmConfig

# An empty log can be made on a full disk, but the guest's ready line could not be written to it.
LEAST_LOG_SPACE = 64 << 10
# Neither VMM's default interrupt controller takes more.
MOST_CPUS = 254


def preflight(config: VmConfig) -> None:
    """Raise InvalidConfigError or HostError, naming the VM, for the first thing that this host cannot give it."""
    try:
        if config.initramfs is not None:
            _check_file("initramfs", config.initramfs)
        for disk in config.disks_with_images:
            _check_file(disk.kind.field, disk.image)
        for disk in config.disks_with_images:
            from pytest_chvm.drivers.images import check_disk

            check_disk(disk)
            if disk.written and not os.access(disk.image, os.W_OK):
                raise InvalidConfigError(f"{disk} cannot be written, and the guest's writes are to stay on it")
        _check_size(config)
        if config.serial_log is not None:
            _check_log(config.serial_log)
        if config.firmware is None:
            _check_kernel(config)
        if config.hugepages:
            check_hugepages(config.memory_mb, config.topology.numa_nodes)
        for share in config.shared_dirs:
            from pytest_chvm.host.virtiofsd import check_shared_dir

            check_shared_dir(share)
        if config.netns is not None:
            check_netns(config.netns)
    except (InvalidConfigError, HostError) as error:
        raise type(error)(f"VM {config.name!r}: {error}", vm_name=config.name) from None


def _check_kernel(config: VmConfig) -> None:
    if (kernel := config.kernel_image) is None:
        raise InvalidConfigError("kernel=None: a driver needs one; launch() and chvm_vm() have a default")
    _check_file("kernel", kernel)
    image = check_kernel_image(kernel, config.architecture.name)
    if config.cmdline is not None and (size := len(os.fsencode(config.cmdline))) > image.cmdline_bytes:
        raise InvalidConfigError(
            f"the kernel command line has {size} bytes, and this kernel takes {image.cmdline_bytes} and cuts off the rest: "
            "shorten it"
        )


def _check_file(key: str, path: Path) -> None:
    if not path.exists():
        raise InvalidConfigError(f"{key} {str(path)!r} does not exist")
    if path.is_dir():
        raise InvalidConfigError(f"{key} {str(path)!r} is a directory, expected a file")
    if not path.is_file() and not path.is_block_device():
        raise InvalidConfigError(f"{key} {str(path)!r} is a pipe, socket or character device, expected a file")
    if not os.access(path, os.R_OK):
        raise InvalidConfigError(f"{key} {str(path)!r} cannot be read by you")


def _check_size(config: VmConfig) -> None:
    # VMMs overcommit processors, but not memory.
    if config.processors > MOST_CPUS:
        raise InvalidConfigError(f"cpus={config.processors}, and the host has {os.cpu_count()}: a VM can have {MOST_CPUS} at most")
    host_mb = memory_limit() >> 20
    if config.memory_mb > host_mb:
        raise MissingRequirementError(
            f"memory_mb={config.memory_mb}, and the host has {host_mb} for this process: give the VM less, or the process more"
        )


def _check_log(log: Path) -> None:
    if log.is_dir():
        raise InvalidConfigError(f"serial_log {str(log)!r} is a directory, expected a file")
    place = next(parent for parent in log.parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise InvalidConfigError(f"the log directory {str(log.parent)!r} cannot be written by you")
    space = os.statvfs(place)
    if space.f_blocks and space.f_bavail * space.f_frsize < LEAST_LOG_SPACE:
        raise HostError(
            f"the disk of the log directory {str(log.parent)!r} is full: {space.f_bavail * space.f_frsize >> 10} KiB are free, "
            f"and the ready line must fit; free {LEAST_LOG_SPACE >> 10} KiB, or name another serial_log"
        )

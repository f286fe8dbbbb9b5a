"""Looking at an image: a VM of ours has it for its disk, and hands out what its system boots with. Kept by the image's content."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Protocol

from pytest_chvm.base.cache import built_once, keep_latest
from pytest_chvm.base.untouched import random_hex
from pytest_chvm.clones.digests import content_key
from pytest_chvm.drivers.disks import plain_images
from pytest_chvm.errors import InvalidConfigError, UnsupportedError
from pytest_chvm.guest.choice import built_in_cmdline
from pytest_chvm.guest.images.inspect import FILE_SYSTEM_MODULES, HANDED_OUT_BYTES, SYSTEM_FILE, NoSystemError, System, take_system
from pytest_chvm.guest.initramfs import WANTED_MODULES, build_initramfs
from pytest_chvm.guest.kernels.kernel import Kernel
from pytest_chvm.guest.kernels.unpacked import unpacked_kernel
from pytest_chvm.guest.ready import DEFAULT_MARKER
from pytest_chvm.host.host import Host
from pytest_chvm.machine.guest_choice import cache_dir
from pytest_chvm.machine.vm import Vm
from pytest_chvm.model import VmConfig
from pytest_chvm.settings import Settings

# What is kept of each takes some 10 MB.
MOST_IMAGES = 64
# Of the VM that looks at an image; it boots with all the time that a slow machine may take.
ARGUMENTS = {"boot": "cold", "network": "none", "boot_timeout": 120.0, "ready_marker": DEFAULT_MARKER}


class Launch(Protocol):
    """What starts a VM: `pytest_chvm.launch`."""

    def __call__(self, config: VmConfig, *, settings: Settings, host: Host) -> Vm:
        """Start it, and return it when it is ready."""


def inspected_system(
    settings: Settings, host: Host, launch: Launch, kernel: Callable[[], Kernel], config: VmConfig
) -> tuple[System, Path]:
    """Return the system on a config's root disk, and the directory that has its kernel and modules.

    `kernel` returns the built-in guest's, which looks at it, started by `launch`. Raises InvalidConfigError where there is none
    that boots here, and what `launch` does.
    """
    image = config.root_disk
    assert image is not None
    cache = cache_dir(settings)
    key = hashlib.sha256(_recipe())
    try:
        for each in plain_images(image):
            key.update(content_key(each, cache, host.show_progress).encode())
    except UnsupportedError:
        # A block device, whose content nothing tells without reading it.
        key.update(random_hex(16).encode())

    def build(directory: Path) -> None:
        host.show_progress(f"looking for the system on {image}")
        _inspect(config, kernel(), settings, host, launch, directory)

    directory = built_once(
        cache / "images" / key.hexdigest()[:32], build, lambda found: (found / SYSTEM_FILE).exists(), progress=host.show_progress
    )
    keep_latest(directory, MOST_IMAGES)
    return System.read(directory), directory


def _inspect(config: VmConfig, kernel: Kernel, settings: Settings, host: Host, launch: Launch, directory: Path) -> None:
    assert config.root_disk is not None
    cache = cache_dir(settings)
    handed_out = directory / "handed-out"
    with handed_out.open("wb") as file:
        file.truncate(HANDED_OUT_BYTES)
    looking = VmConfig(
        name=f"looks-at-{re.sub(r'[^A-Za-z0-9]', '-', config.root_disk.stem)[:30]}-{random_hex(4)}",
        kernel=unpacked_kernel(kernel.image, cache),
        initramfs=build_initramfs(kernel, cache, host.show_progress, wanted=(*WANTED_MODULES, *FILE_SYSTEM_MODULES)),
        cmdline=built_in_cmdline(config.architecture),
        arch=config.arch,
        root_disk=config.root_disk,
        data_disk=handed_out,
    )
    settings = settings.with_arguments(ARGUMENTS)
    try:
        with launch(looking, settings=settings, host=host) as vm:
            take_system(lambda script, data: vm.machine.run(script, input=data), handed_out, directory)
    except NoSystemError as error:
        raise InvalidConfigError(
            f"VM {config.name!r}: root_disk {str(config.root_disk)!r} has no system that can be booted: {error}. Expected is a raw "
            "or qcow2 image, partitioned or not, with Linux on ext4, xfs or btrfs; what needs more to find its root (LVM, "
            "encryption, RAID) boots with kernel=, initramfs= and cmdline= of its own",
            vm_name=config.name,
        ) from error
    handed_out.unlink()


@lru_cache(maxsize=1)
def _recipe() -> bytes:
    files = resources.files("pytest_chvm.guest.images")
    return b"".join(files.joinpath(name).read_bytes() for name in ("inspect.py", "inspect.sh", "boot_entries.py", "superblocks.py"))

"""Which VMs can be clones of a template, and what the template is made of."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from pytest_chvm import __version__
from pytest_chvm.clones.digests import digest_of
from pytest_chvm.drivers.base import SAVE, Saves, VmDriver
from pytest_chvm.drivers.disks import plain_images
from pytest_chvm.errors import UnsupportedError
from pytest_chvm.guest.kinds import Guest
from pytest_chvm.model import DISK_KINDS, MEMORY_BUSES, SEED, AnyDisk, EmptyDisk, Tap, VmConfig, plugged_into_clones

# Of /proc/cpuinfo.
PROCESSOR_FACTS = ("model name", "flags", "microcode")
KVM_MODULES = Path("/sys/module")


def why_no_clone(guest: Guest, driver: VmDriver, *, network_mode: str) -> str | None:
    """Return why a VM has to be booted, or None where it can be a clone.

    `network_mode` is that of a VM whose config names no networks.
    """
    config = guest.config
    if not isinstance(driver, Saves):
        return f"{driver.vmm} cannot {SAVE}"
    if (why := guest.why_no_clone(network_mode)) is not None:
        return why
    if config.firmware is not None:
        return "its own boot loader boots it"
    if (why := _why_no_clone_of_machine(config)) is not None:
        return why
    slots = driver.abilities.spare_slots
    plugged = plugged_into_clones(config.all_disks)
    if memory := [each for each in plugged if each.kind.bus in MEMORY_BUSES]:
        return f"{memory[0]} is on bus {memory[0].kind.bus!r}, and a clone would have to have it plugged in"
    if len(config.shared_dirs) + len(plugged) > slots:
        return f"it has more shared dirs and disks than the {slots} for which a clone has places"
    if not all(network.clonable for network in config.networks or ()):
        return "it has a network that is not a TAP's"
    try:
        for disk in config.disks_with_images:
            if not disk.written and disk.kind is not SEED:
                plain_images(disk.image)
    except (OSError, UnsupportedError) as error:
        return str(error)
    return None


def _why_no_clone_of_machine(config: VmConfig) -> str | None:
    if config.channels:
        return "it has channels"
    if config.gdb:
        return "it is there for a debugger"
    if config.vmm_args:
        return "of what its vmm_args stand for nothing is known"
    if config.hugepages:
        return "its memory is on hugepages, and a template's is a file"
    if config.topology.numa_nodes > 1:
        return "it has several NUMA nodes, each with memory of its own"
    return None


def why_no_snapshot(config: VmConfig, driver: VmDriver, devices: Iterable[str], *, is_clone: bool) -> str | None:
    """Return why a running VM of a kind that can be cloned cannot be saved, or None where it can."""
    if any(disk.kind.throwaway for disk in config.all_disks) and not driver.abilities.live_root_disk:
        return f"{driver.vmm} has all of a root disk in its file only when it has ended"
    if plugged := plugged_into_clones(config.all_disks):
        why = "which would be its clones' too" if plugged[0].written else "whose state is not saved"
        return f"it has {plugged[0]}, {why}"
    if config.root is not None:
        return "its root is the host's, which cannot be unplugged while it is the root: make clones with boot='clone'"
    if config.shared_dirs and not is_clone:
        return "its shared dirs cannot be unplugged: start it with boot='clone' or 'auto'"
    if names := ", ".join(devices):
        return f"{names} was plugged in: remove it first"
    return None


def template_config(config: VmConfig) -> VmConfig:
    """Return the config of a VM's template: the VM without what each clone gets fresh."""
    networks = None if config.networks is None else [Tap() for _ in config.networks]
    plugged = plugged_into_clones(config.all_disks)
    further = [disk for disk in config.all_disks if disk.kind not in DISK_KINDS]
    disks = [disk for disk, found in zip(config.disks, further, strict=True) if found not in plugged]
    return clone_config(config).replace(networks=networks, shared_dirs=(), netns=None, data_disk=None, disks=disks)


def clone_config(config: VmConfig) -> VmConfig:
    """Return a clone's config: disks and shared dirs are plugged in, for which the template needs places too."""
    return config.replace(hotplug=config.hotplug or bool(plugged_into_clones(config.all_disks) or config.shared_dirs))


def made_of(
    guest: Guest, driver: Saves, identify: Callable[[Path], str], *, network_mode: str, ready_marker: str
) -> dict[str, object]:
    """Return all that the template of a guest depends on, by name, for its key; `identify` says which file one is.

    Raises OSError where a file cannot be read.
    """
    config = template_config(guest.config)
    return {
        # Another version of this package may start, save and renew VMs in another way.
        "code": _code(),
        "vmm": driver.snapshot_key(),
        "host": [platform.machine(), platform.release(), platform.version(), _processor(), _kvm_parameters()],
        "arch": config.architecture.name,
        "guest": guest.clone_key(ready_marker),
        "kernel": identify(config.kernel_image) if config.kernel_image else None,
        "initramfs": identify(config.initramfs) if config.initramfs else None,
        "disks": [[*_disk_words(disk), *_disk_identity(disk, identify)] for disk in config.all_disks],
        "cmdline": config.cmdline,
        "processors": [config.processors, repr(config.cpus), config.max_cpus, config.cpu, config.nested],
        "devices": [config.rng, config.balloon, config.iommu],
        "memory_mb": [config.memory_mb, config.max_memory_mb],
        "networks": [network_mode] if config.networks is None else ["tap"] * len(config.networks),
        "hotplug": config.hotplug,
    }


def _disk_words(disk: AnyDisk) -> list[object]:
    kind = disk.kind
    return [kind.id, kind.bus, kind.block_size, kind.serial, kind.read_only]


def _disk_identity(disk: AnyDisk, identify: Callable[[Path], str]) -> list[object]:
    """Return what identifies a disk that a template has; of a seed, which each test may make anew, its content alone."""
    if isinstance(disk, EmptyDisk):
        return [disk.size_mb]
    if disk.kind is SEED:
        return [digest_of(disk.image)]
    # Its path too, which is in the template's overlay.
    return [[os.fspath(image), identify(image)] for image in plain_images(disk.image)]


@lru_cache(maxsize=1)
def _code() -> str:
    """Return the hash of this package, scripts for guests included."""
    digest = hashlib.sha256(__version__.encode())
    for name, content in _package_files():
        digest.update(f"{name} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()


def _package_files() -> Iterator[tuple[str, bytes]]:
    # By strings: the first clone of each run waits for this, and a sorted tree of paths takes four times as long.
    package = os.path.dirname(os.path.dirname(__file__))
    for place, directories, names in os.walk(package):
        directories[:] = sorted(name for name in directories if name != "__pycache__")
        for name in sorted(names):
            with open(os.path.join(place, name), "rb") as file:
                yield os.path.join(place, name)[len(package) + 1 :], file.read()


@lru_cache(maxsize=1)
def _processor() -> str:
    # With KVM a guest sees the host's processor, and a microcode update may remove features.
    lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(PROCESSOR_FACTS))


def _kvm_parameters() -> list[str]:
    # Whether a guest may have guests, for instance, is a flag of its processor.
    found = []
    for parameter in sorted(KVM_MODULES.glob("kvm*/parameters/*")):
        with suppress(OSError):
            found.append(f"{parameter.parent.parent.name}.{parameter.name}={parameter.read_text(errors='replace').strip()}")
    return found

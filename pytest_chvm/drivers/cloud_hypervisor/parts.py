"""Cloud Hypervisor's arguments for a machine's processors, memory and smaller devices."""

from __future__ import annotations

import os
import subprocess
from functools import lru_cache
from pathlib import Path

from pytest_chvm.drivers.boot import GDB_SOCKET, Boot
from pytest_chvm.drivers.cloud_hypervisor.disks import quoted
from pytest_chvm.errors import UnsupportedError
from pytest_chvm.host.hugepages import hugepage_size_kb
from pytest_chvm.model import Cpus, VmConfig

HELP_TIMEOUT_S = 10.0
# What only a build of its own has: the releases are without.
DEBUG_BUILD = "cargo build --features guest_debug"


def processors(config: VmConfig) -> list[str]:
    """Return the arguments of the processors; a topology is threads of a core, cores of a die, dies of a package, packages."""
    value = f"boot={config.processors}{f',max={config.max_cpus}' if config.max_cpus else ''}"
    if isinstance(config.cpus, Cpus):
        value += f",topology={config.cpus.threads}:{config.cpus.cores}:1:{config.cpus.sockets}"
    return ["--cpus", f"{value}{',nested=on' if config.nested else ''}"]


def memory(boot: Boot) -> list[str]:
    """Return the arguments of the memory, in equal parts on its NUMA nodes."""
    config, cpus = boot.config, boot.config.topology
    # Their size is said, since it would ask /dev/hugepages, which need not be mounted.
    pages = f",hugepages=on,hugepage_size={hugepage_size_kb()}K" if config.hugepages else ""
    # For vhost-user: a shared dir, now or plugged in later.
    shared = ",shared=on" if config.shared_dirs or config.hotplug else ""
    if cpus.numa_nodes > 1:
        words = ["--memory", "size=0"]
        zones = [f"id=memory{node},size={config.memory_mb // cpus.numa_nodes}M{shared}{pages}" for node in range(cpus.numa_nodes)]
        nodes = [_node(node, cpus.of_node(node)) for node in range(cpus.numa_nodes)]
        return [*words, "--memory-zone", *zones, "--numa", *nodes]
    if boot.memory is not None:
        if config.max_memory_mb:
            raise UnsupportedError(
                f"VM {config.name!r}: Cloud Hypervisor cannot add memory to a VM that can be cloned: leave out max_memory_mb",
                vm_name=config.name,
            )
        path = quoted(Path(boot.memory.path))
        return ["--memory", "size=0", "--memory-zone", f"id=memory,size={config.memory_mb}M,file={path},shared=on"]
    room = f",hotplug_size={config.max_memory_mb - config.memory_mb}M" if config.max_memory_mb else ""
    return ["--memory", f"size={config.memory_mb}M{room}{shared}{pages}"]


def _node(number: int, cpus: range) -> str:
    return f"guest_numa_id={number},cpus=[{cpus[0]}-{cpus[-1]}],memory_zones=[memory{number}]"


def small_devices(config: VmConfig) -> list[str]:
    """Return the arguments of the devices that a VM has one of, or none; a virtio-rng it has in any case."""
    words = ["--balloon", "size=0"] if config.balloon else []
    # There is an IOMMU once something is behind it.
    return words + (["--rng", "src=/dev/urandom,iommu=on"] if config.iommu else [])


def debugger(boot: Boot) -> list[str]:
    """Return the arguments of the stub for a debugger."""
    return ["--gdb", f"path={quoted(boot.socket(GDB_SOCKET))}"] if boot.config.gdb else []


def why_no_debugger(binary: Path, config: VmConfig) -> str | None:
    """Return why a debugger cannot be attached to a VM of this executable's, or None where it can."""
    if "--gdb" not in _help_of(os.fspath(binary), binary.stat().st_mtime_ns):
        return f"{binary} was built without it: {DEBUG_BUILD}"
    # `stop_on_boot` of its vmm/src/vm.rs.
    return None if config.gdb == "wait" else "with a stub it does not start before a debugger says so: gdb='wait'"


@lru_cache(maxsize=8)
def _help_of(binary: str, _mtime_ns: int) -> str:
    try:
        return subprocess.run([binary, "--help"], capture_output=True, text=True, timeout=HELP_TIMEOUT_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        # The error of starting it says more.
        return ""

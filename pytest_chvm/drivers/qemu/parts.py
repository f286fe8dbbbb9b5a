"""QEMU's arguments for a machine's processors, memory and smaller devices."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pytest_chvm.drivers.boot import GDB_SOCKET, Boot
from pytest_chvm.drivers.disks import DiskFile
from pytest_chvm.drivers.qemu.arguments import quoted
from pytest_chvm.drivers.qemu.disks import memory_slots
from pytest_chvm.model import Cpus, VmConfig

# The module of Linux that offers the guest's processors to guests of its own: in software they are AMD's.
NESTED_IN_SOFTWARE = "+svm,+npt"
# Linux takes AMD's word for threads of a core only by a flag that software does not have.
THREADS_IN_SOFTWARE = "vendor=GenuineIntel"
HOTPLUG_SLOTS = 8


def machine(config: VmConfig, kind: str, files: Sequence[DiskFile]) -> list[str]:
    """Return the arguments of the machine as such: its kind, which disks are memory, how its memory is given to it."""
    options = [kind, *([] if config.topology.numa_nodes > 1 else ["memory-backend=ram"])]
    return ["-machine", ",".join([*options, *(["nvdimm=on"] if memory_slots(files)[0] else [])])]


def processors(config: VmConfig, *, kvm: bool, in_software: str) -> list[str]:
    """Return the arguments of the processors; `in_software` is their model where nobody names one and there is no KVM."""
    model = config.cpu or ("host" if kvm else in_software)
    if config.nested and not kvm:
        model += f",{NESTED_IN_SOFTWARE}"
    elif config.topology.threads > 1 and config.cpu is None and not kvm and config.architecture.name == "x86_64":
        model += f",{THREADS_IN_SOFTWARE}"
    words = ["-cpu", model, "-smp"]
    if isinstance(config.cpus, Cpus):
        cpus = config.cpus
        return [*words, f"{cpus.count},sockets={cpus.sockets},cores={cpus.cores},threads={cpus.threads}"]
    return [*words, f"{config.cpus}{f',maxcpus={config.max_cpus}' if config.max_cpus else ''}"]


def memory(boot: Boot, files: Sequence[DiskFile]) -> list[str]:
    """Return the arguments of the memory, in equal parts on its NUMA nodes."""
    config, cpus = boot.config, boot.config.topology
    slots, slots_mb = memory_slots(files)
    room = f",slots={HOTPLUG_SLOTS + slots},maxmem={(config.max_memory_mb or config.memory_mb) + slots_mb}M"
    words = ["-m", f"{config.memory_mb}M{room if config.max_memory_mb or slots else ''}"]
    if cpus.numa_nodes == 1:
        return [*words, "-object", _backend(boot, "ram", config.memory_mb)]
    for node in range(cpus.numa_nodes):
        its = cpus.of_node(node)
        words += ["-object", _backend(boot, f"ram{node}", config.memory_mb // cpus.numa_nodes)]
        words += ["-numa", f"node,nodeid={node},cpus={its[0]}-{its[-1]},memdev=ram{node}"]
    return words


def _backend(boot: Boot, name: str, size_mb: int) -> str:
    config, size = boot.config, f"id={name},size={size_mb}M"
    if config.hugepages:
        return f"memory-backend-memfd,{size},share=on,hugetlb=on"
    if boot.memory is not None:
        path = quoted(Path(boot.memory.path))
        return f"memory-backend-file,{size},mem-path={path},share={'on' if boot.memory.shared else 'off'}"
    # For vhost-user: a shared dir, now or plugged in later.
    if config.shared_dirs or config.hotplug:
        return f"memory-backend-memfd,{size},share=on"
    return f"memory-backend-ram,{size}"


def small_devices(config: VmConfig) -> list[str]:
    """Return the arguments of the devices that a VM has one of, or none. The IOMMU has to come before all that is behind it."""
    words = ["-device", "intel-iommu"] if config.iommu else []
    words += ["-device", "virtio-rng-pci"] if config.rng else []
    return words + (["-device", "virtio-balloon-pci"] if config.balloon else [])


def debugger(boot: Boot) -> list[str]:
    """Return the arguments of a debugger's stub, which listens from the start on; with "wait" nothing runs until it says so."""
    if not boot.config.gdb:
        return []
    listener = boot.add_listener(GDB_SOCKET)
    words = ["-chardev", f"socket,id=gdb,fd={listener},server=on,wait=off", "-gdb", "chardev:gdb"]
    return words + (["-S"] if boot.config.gdb == "wait" else [])


def serial_ports(boot: Boot) -> list[str]:
    """Return the arguments of the virtio console and of the channels."""
    words = ["-device", "virtio-serial-pci"] if boot.options.console or boot.config.channels else []
    if boot.options.console:
        words += ["-device", "virtconsole,chardev=console"]
        words += ["-chardev", f"socket,id=console,fd={boot.add_listener('console.sock')},server=on,wait=off"]
    for index, name in enumerate(boot.config.channels):
        words += ["-device", f"virtserialport,chardev=channel{index},name={name}"]
        listener = boot.add_listener(channel_socket(name))
        words += ["-chardev", f"socket,id=channel{index},fd={listener},server=on,wait=off"]
    return words


def channel_socket(name: str) -> str:
    """Return the name of a channel's socket: of fixed length, so that the path fits into an address whatever the channel's name."""
    return f"channel-{hashlib.sha256(name.encode()).hexdigest()[:8]}.sock"

"""QEMU's disks: as arguments, and plugged into a clone over QMP, in the order in which the guest is to find them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from pytest_chvm.drivers.disks import LAST_SLOT, DiskFile
from pytest_chvm.drivers.qemu import devices
from pytest_chvm.drivers.qemu.arguments import quoted
from pytest_chvm.model import MEMORY_BUSES, MODULES, DiskKind, VmHandle

SCSI_CONTROLLER = {"driver": "virtio-scsi-pci", "id": "scsi"}
DRIVERS = {"virtio": "virtio-blk-pci", "nvme": "nvme", "scsi": "scsi-hd", "nvdimm": "nvdimm", "pmem": "virtio-pmem-pci"}
# Of a PCI slot.
FUNCTIONS = 8


def arguments(files: Sequence[DiskFile], *, hotplug: bool) -> list[str]:
    """Return the arguments of the disks that a VM is booted with; with `hotplug` others may come."""
    words = []
    for file in files:
        if file.kind.bus in MEMORY_BUSES:
            words += ["-object", f"memory-backend-file,id={file.kind.id},share=on,size={file.size},mem-path={quoted(file.path)}"]
            words += ["-device", f"{DRIVERS[file.kind.bus]},memdev={file.kind.id}"]
            continue
        mode = "on" if file.kind.read_only else "off"
        node = f"node-name={file.kind.id},driver={file.format},read-only={mode},file.driver=file,file.filename={quoted(file.path)}"
        words += ["-blockdev", node]
        if file.kind.bus == "scsi" and _as_option(SCSI_CONTROLLER) not in words:
            words += ["-device", _as_option(SCSI_CONTROLLER)]
        words += _last_device(file.kind, hotplug=hotplug) if file.kind is MODULES else ["-device", _as_option(_device(file.kind))]
    return words


def _last_device(kind: DiskKind, *, hotplug: bool) -> list[str]:
    """Return the arguments of the device that is behind all others: Linux goes through a bus before those behind its bridges."""
    place = f"addr={LAST_SLOT:x}"
    if not hotplug:
        return ["-device", f"{_as_option(_device(kind))},{place}"]
    port = f"pcie-root-port,id=last,chassis={LAST_SLOT},slot={LAST_SLOT},{place}"
    return ["-device", port, "-device", f"{_as_option(_device(kind))},bus=last"]


def memory_slots(files: Sequence[DiskFile]) -> tuple[int, int]:
    """Return how many disks are memory, and how many MiB QEMU needs room for: each begins and ends at a whole GiB."""
    sizes = [file.size for file in files if file.kind.bus in MEMORY_BUSES]
    return len(sizes), sum((size >> 30) + 1 << 10 for size in sizes)


def _device(kind: DiskKind) -> dict[str, Any]:
    """Return a disk's device, by the names of its properties."""
    device: dict[str, Any] = {"driver": DRIVERS[kind.bus], "drive": kind.id}
    # An NVMe controller has to have one.
    if (serial := kind.serial or (kind.id if kind.bus == "nvme" else None)) is not None:
        device["serial"] = serial
    if kind.block_size != 512:
        device |= {"logical_block_size": kind.block_size, "physical_block_size": kind.block_size}
    return device | ({"bus": f"{SCSI_CONTROLLER['id']}.0"} if kind.bus == "scsi" else {})


def _as_option(device: dict[str, Any]) -> str:
    driver, *rest = device.items()
    return ",".join([str(driver[1]), *(f"{key}={value}" for key, value in rest)])


async def plug(client: Any, handle: VmHandle, files: Sequence[DiskFile]) -> None:
    """Plug disks into a VM that does not run yet, with a QMP client.

    They are functions of one slot, which Linux looks at in their order; of several slots each has a thread of its own there.
    """
    on_pci: list[dict[str, Any]] = []
    for file in files:
        backend = {"driver": "file", "filename": os.fspath(file.path)}
        node = {"driver": file.format, "node-name": file.kind.id, "read-only": file.kind.read_only, "file": backend}
        await client.execute("blockdev-add", node)
        if file.kind.bus != "scsi":
            on_pci.append(_device(file.kind))
        elif SCSI_CONTROLLER not in on_pci:
            on_pci.append(SCSI_CONTROLLER)
    for start in range(0, len(on_pci), FUNCTIONS):
        port = await devices.needed_port(client, handle)
        slot = on_pci[start : start + FUNCTIONS]
        # The slot is taken note of with its first function.
        for number, device in reversed(list(enumerate(slot))):
            await client.execute("device_add", {**device, "bus": port, "addr": f"0.{number}", "multifunction": len(slot) > 1})
    for file in files:
        if file.kind.bus == "scsi":
            await client.execute("device_add", _device(file.kind))

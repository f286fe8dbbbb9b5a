"""Devices that come and go while a QEMU VM runs, over QMP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_chvm.base.untouched import random_hex
from pytest_chvm.drivers.base import share_id
from pytest_chvm.drivers.qemu import qmp
from pytest_chvm.errors import UnsupportedError
from pytest_chvm.model import SharedDir, VmHandle

# Of a q35 machine that was booted with room for devices.
SPARE_PORTS = 8
UNPLUG_TIMEOUT_S = 20.0


def port_arguments() -> list[str]:
    """Return the arguments that give a machine its spare PCIe ports: a q35's own bus takes nothing while it runs."""
    return [word for n in range(SPARE_PORTS) for word in ("-device", f"pcie-root-port,id=spare{n},chassis={n + 1},slot={n + 1}")]


def add_disk(handle: VmHandle, socket_path: Path, image: Path, form: str, *, read_only: bool) -> str:
    """Plug a disk in; returns its id."""
    name = _new_id("disk")

    async def work(client: Any) -> None:
        file = {"driver": "file", "filename": str(image)}
        port = await needed_port(client, handle)
        await client.execute("blockdev-add", {"driver": form, "node-name": name, "read-only": read_only, "file": file})
        await client.execute("device_add", {"driver": "virtio-blk-pci", "id": name, "drive": name, "bus": port})

    qmp.session(handle.name, socket_path, work)
    return name


def add_tap(handle: VmHandle, socket_path: Path, tap: str, mac: str) -> str:
    """Plug a NIC in; returns its id."""
    name: str = qmp.session(handle.name, socket_path, lambda client: plug_nic(client, handle, tap, mac))
    return name


async def plug_nic(client: Any, handle: VmHandle, tap: str, mac: str) -> str:
    """Plug a NIC in that is attached to a TAP, with a QMP client; returns its id."""
    name = _new_id("nic")
    port = await needed_port(client, handle)
    await client.execute("netdev_add", {"type": "tap", "id": name, "ifname": tap, "script": "no", "downscript": "no"})
    device = {"driver": "virtio-net-pci", "id": name, "netdev": name, "mac": mac, "romfile": "", "bus": port}
    await client.execute("device_add", device)
    return name


def add_share(handle: VmHandle, socket_path: Path, share: SharedDir, share_socket: Path) -> str:
    """Plug a shared dir in whose virtiofsd listens at `share_socket`; returns its id."""
    name: str = qmp.session(handle.name, socket_path, lambda client: plug_share(client, handle, share, share_socket))
    return name


async def plug_share(client: Any, handle: VmHandle, share: SharedDir, share_socket: Path) -> str:
    """Plug a shared dir in, with a QMP client; returns its id."""
    name = share_id(share)
    address = {"type": "unix", "data": {"path": str(share_socket)}}
    port = await needed_port(client, handle)
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    await client.execute("chardev-add", {"id": name, "backend": backend})
    device = {"driver": "vhost-user-fs-pci", "id": name, "chardev": name, "tag": share.tag, "queue-size": 512, "bus": port}
    await client.execute("device_add", device)
    return name


async def needed_port(client: Any, handle: VmHandle) -> str:
    """Return the id of a free PCIe port, with a QMP client; raises UnsupportedError where there is none."""
    free = await _free_port(client)
    if free is None:
        raise UnsupportedError(
            f"VM {handle.name!r} has no free PCIe port: boot it with hotplug=True ({SPARE_PORTS} ports) or remove a device",
            vm_name=handle.name,
        )
    return free


async def _free_port(client: Any) -> str | None:
    buses = await client.execute("query-pci")
    devices: list[dict[str, Any]] = [device for bus in buses for device in bus["devices"]]
    for device in devices:
        if device.get("qdev_id", "").startswith("spare") and not device.get("pci_bridge", {}).get("devices"):
            return str(device["qdev_id"])
    return None


def remove_device(handle: VmHandle, socket_path: Path, device: str) -> None:
    """Unplug a device and wait until the guest has let go of it; raises HypervisorError where it does not."""

    async def work(client: Any) -> None:
        from qemu.qmp import EventListener

        gone = EventListener("DEVICE_DELETED", lambda event: _data(event).get("device") == device)
        with client.listen(gone):
            await client.execute("device_del", {"id": device})
            await qmp.next_event(client, gone)
        kind = device.split("-")[0]
        command, key = {"disk": ("blockdev-del", "node-name"), "nic": ("netdev_del", "id"), "fs": ("chardev-remove", "id")}[kind]
        await client.execute(command, {key: device})

    overdue = f"the guest did not let go of {device!r}"
    qmp.session(handle.name, socket_path, work, timeout_s=UNPLUG_TIMEOUT_S, overdue=overdue)


def _data(event: Mapping[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = event["data"]
    return data


def resize(handle: VmHandle, socket_path: Path, *, cpus: int | None, memory_mb: int | None) -> None:
    """Plug processors and memory in until the VM has that many; raises UnsupportedError for fewer than it has."""

    async def work(client: Any) -> None:
        if cpus is not None:
            await _add_cpus(client, handle, cpus)
        if memory_mb is not None:
            await _add_memory(client, handle, memory_mb)

    qmp.session(handle.name, socket_path, work)


async def _add_cpus(client: Any, handle: VmHandle, cpus: int) -> None:
    slots = await client.execute("query-hotpluggable-cpus")
    used = [slot for slot in slots if "qom-path" in slot]
    free = [slot for slot in reversed(slots) if "qom-path" not in slot]
    if cpus < len(used):
        raise UnsupportedError(f"VM {handle.name!r} has {len(used)} processors: QEMU only adds", vm_name=handle.name)
    if cpus > len(slots):
        raise UnsupportedError(
            f"VM {handle.name!r} has room for {len(slots)} processors: boot it with max_cpus={cpus}", vm_name=handle.name
        )
    for slot in free[: cpus - len(used)]:
        await client.execute("device_add", {"driver": slot["type"], "id": _new_id("cpu"), **slot["props"]})


async def _add_memory(client: Any, handle: VmHandle, memory_mb: int) -> None:
    summary = await client.execute("query-memory-size-summary")
    now_mb = (summary["base-memory"] + summary.get("plugged-memory", 0)) >> 20
    extra_mb = memory_mb - now_mb
    if extra_mb < 0 or extra_mb % 128:
        raise UnsupportedError(
            f"VM {handle.name!r} has {now_mb} MiB: QEMU only adds, and Linux takes it in steps of 128 MiB", vm_name=handle.name
        )
    if extra_mb:
        name = _new_id("mem")
        await client.execute("object-add", {"qom-type": "memory-backend-ram", "id": name, "size": extra_mb << 20})
        await client.execute("device_add", {"driver": "pc-dimm", "id": f"dimm-{name}", "memdev": name})


def _new_id(kind: str) -> str:
    return f"{kind}-{random_hex(4)}"

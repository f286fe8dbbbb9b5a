"""QEMU: with KVM where it runs guests, in software elsewhere."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_chvm.base.untouched import Socket
from pytest_chvm.drivers.base import Abilities, AbleDriver
from pytest_chvm.drivers.boot import DEFAULT_OPTIONS, MEMORY_FILE, ROOT_FILE, Boot, BootOptions, VmmCommand
from pytest_chvm.drivers.disks import copy_overlay, default_cmdline, disk_files, image_format, plugged_files, save_empty_disks
from pytest_chvm.drivers.keys import binary_key
from pytest_chvm.drivers.process import VmmProcess
from pytest_chvm.drivers.qemu import arguments, devices, parts, qmp
from pytest_chvm.drivers.qemu import disks as qemu_disks
from pytest_chvm.drivers.qemu import dump as qemu_dump
from pytest_chvm.drivers.qemu import events as qemu_events
from pytest_chvm.drivers.qemu import firmware as qemu_firmware
from pytest_chvm.drivers.qemu import state as qemu_state
from pytest_chvm.drivers.qemu import vsock as qemu_vsock
from pytest_chvm.drivers.qemu.machines import Machine, machine_of
from pytest_chvm.errors import HypervisorError, InvalidConfigError, VmError, VmIOError, VmNotFoundError
from pytest_chvm.host import versions
from pytest_chvm.host.binaries import Binary, find_binary
from pytest_chvm.host.host import Host, default_host
from pytest_chvm.host.kvm import require_nested_kvm, why_no_kvm
from pytest_chvm.model import ServedShare, SharedDir, VmConfig, VmHandle, VmState, VmStatus, architecture

PLACES = ("/usr/bin", "/usr/local/bin", "/usr/libexec")
SYSTEM_CALLS = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
# The VMM is asked when something else has taken too long already.
RUN_STATE_TIMEOUT_S = 2.0


class QemuDriver(AbleDriver):
    """Runs VMs with QEMU. `accel` is "auto", "kvm" or "tcg" (software); `arch` their architecture (None: this machine's)."""

    vmm = "qemu"
    abilities = Abilities(
        user_network=True,
        multicast_network=True,
        cpu_models=True,
        other_architectures=True,
        live_root_disk=True,
        disk_buses=frozenset(qemu_disks.DRIVERS),
        block_sizes=True,
        without_rng=True,
        iommu="INTEL_IOMMU",
        nested=True,
        spare_slots=devices.SPARE_PORTS,
        # QEMU drops what does not fit into the socket's buffer.
        console_piece=1 << 15,
    )

    def __init__(
        self,
        *,
        accel: str = "auto",
        binary: Path | None = None,
        virtiofsd: Path | None = None,
        host: Host | None = None,
        arch: str | None = None,
    ) -> None:
        if accel not in ("auto", "kvm", "tcg"):
            raise InvalidConfigError(f"accel={accel!r}: expected auto, kvm or tcg")
        self.arch = architecture(arch)
        if self.arch.name != "x86_64":
            buses = self.abilities.disk_buses - {"nvdimm"}
            self.abilities = replace(self.abilities, disk_buses=buses, iommu=None, nested=False)
        if accel == "kvm" and not self.arch.is_host:
            raise InvalidConfigError(
                f"accel='kvm' runs guests of this machine's architecture only, and not {self.arch.name}: use accel='tcg'"
            )
        self.accel = accel
        self._binary = binary
        self._process = VmmProcess(self, ("qemu-system", "qemu-kvm"), virtiofsd, host or default_host())
        self._events: dict[str, qemu_events.QemuEvents] = {}

    def binary(self) -> Binary:
        """Return the QEMU of its architecture; raises InvalidConfigError where there is none, or one that is too old."""
        name = f"qemu-system-{self.arch.name}"
        install = f"install {machine_of(self.arch.name).packages}{', or name one with --chvm-binary' if self.arch.is_host else ''}"
        # The one that was named is this machine's, unless it says otherwise.
        named = self._binary if self.arch.is_host or (self._binary and self._binary.name == name) else None
        found = find_binary(name, PLACES, install, named)
        versions.check_program(found, "qemu", "leave out --chvm-vmm=qemu, or name another --chvm-binary")
        versions.require(found, versions.Feature.QEMU_OPTIONS, install)
        return found

    def why_not(self) -> str | None:
        """Return why QEMU cannot be used here."""
        try:
            self.binary()
        except InvalidConfigError as error:
            return str(error)
        return None

    def snapshot_key(self) -> list[str]:
        """Return the parts of QEMU that a snapshot depends on."""
        binary = self.binary()
        accel = "kvm" if self._uses_kvm() else "tcg"
        return [
            self.vmm,
            *binary_key(binary),
            accel,
            str(qemu_vsock.why_no_vsock()),
            *qemu_state.firmware_key(binary.path, self._machine.firmware),
            # What all VMs have: a saved one cannot go on in a machine with other devices.
            self._machine.type,
            *qemu_events.PANIC_DEVICE,
            *self._machine.devices,
        ]

    @property
    def _machine(self) -> Machine:
        return machine_of(self.arch.name)

    def _uses_kvm(self) -> bool:
        return self.accel == "kvm" or (self.accel == "auto" and self.arch.is_host and why_no_kvm() is None)

    def firmware(self) -> list[Path]:
        """Return the UEFI firmware's code and its first variables; raises MissingRequirementError where there is none."""
        found = qemu_firmware.find_firmware(self.arch.name)
        return [found.code, found.variables]

    def failure_hint(self) -> str | None:
        """Return why KVM does not work here, where it was asked for."""
        reason = why_no_kvm()
        return f"KVM was asked for, and does not work here: {reason}" if self.accel == "kvm" and reason else None

    def boot(self, config: VmConfig, options: BootOptions = DEFAULT_OPTIONS) -> VmHandle:
        """Start a VM and return at once, STARTING."""
        return self._process.boot(config, self._command, options)

    def _command(self, boot: Boot) -> VmmCommand:
        config = boot.config
        shown: dict[str, str] = {}
        binary = os.fspath(self.binary().path)
        machine = [*(["ip", "netns", "exec", config.netns] if config.netns else []), binary]
        machine += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        machine += ["-name", config.name, "-uuid", boot.machine_id, "-sandbox", SYSTEM_CALLS]
        kvm = self._uses_kvm()
        if config.nested and kvm:
            require_nested_kvm(config.name)
        files = disk_files(boot)
        machine += parts.machine(config, self._machine.type, files)
        machine += ["-accel", "kvm" if kvm else "tcg", *parts.processors(config, kvm=kvm, in_software=self._machine.cpu)]
        machine += parts.memory(boot, files)
        machine += devices.port_arguments() if config.hotplug else []
        machine += self._boot_source(config) if config.firmware is None else qemu_firmware.firmware_arguments(boot, self.arch.name)
        machine += ["-chardev", f"file,id=serial,path={arguments.quoted(boot.serial_log)},append=on", "-serial", "chardev:serial"]
        machine += [*parts.small_devices(config), *self._machine.devices]
        machine += arguments.nics(boot, shown)
        if vsock := qemu_vsock.open_device(config.name):
            fd, cid = vsock
            number = boot.add_fd(fd)
            machine += ["-device", f"vhost-vsock-pci,id={qemu_vsock.DEVICE},guest-cid={cid},vhostfd={number}"]
            shown[f",vhostfd={number}"] = ""
        machine += qemu_disks.arguments(files, hotplug=config.hotplug)
        # A clone's shared dirs are plugged in before it goes on.
        machine += arguments.shares(boot) if boot.restoring is None else []
        machine += config.vmm_args
        control = ["-incoming", "defer", "-S"] if boot.restoring is not None else []
        control += ["-chardev", f"socket,id=qmp,fd={boot.add_listener('qmp.sock')},server=on,wait=off"]
        control += ["-mon", "chardev=qmp,mode=control", *qemu_events.event_arguments(boot)]
        control += qemu_events.PANIC_DEVICE if boot.options.console else ()
        control += [*parts.serial_ports(boot), *parts.debugger(boot)]
        return VmmCommand(machine, control, qemu_events.event_log(boot.lease.directory), shown)

    @staticmethod
    def _boot_source(config: VmConfig) -> list[str]:
        cmdline = default_cmdline(config) if config.cmdline is None else config.cmdline
        words = ["-kernel", os.fspath(config.kernel or ""), "-append", cmdline]
        return words + (["-initrd", os.fspath(config.initramfs)] if config.initramfs else [])

    def stop(self, handle: VmHandle) -> None:
        """End the VMM with SIGTERM, after 10 s with SIGKILL, and remove all that the VM had."""
        self._events.pop(handle.machine_id, None)
        self._process.stop(handle)

    def kill(self, handle: VmHandle) -> None:
        """End the VMM with SIGKILL and remove all that the VM had."""
        self._events.pop(handle.machine_id, None)
        self._process.kill(handle)

    def state(self, handle: VmHandle) -> VmStatus:
        """Return what has become of a VM; one that QEMU has paused for want of space is paused."""
        status = self._process.state(handle)
        if status.state in (VmState.RUNNING, VmState.READY):
            events = self._events_of(handle)
            events.read()
            if events.stopped_by is not None:
                return replace(status, state=VmState.PAUSED)
        return status

    def open_console(self, handle: VmHandle) -> int:
        """Return a connection to the socket behind the guest's virtio console."""
        return self._connect(handle, "console.sock", "console")

    def open_channel(self, handle: VmHandle, name: str) -> int:
        """Return a connection to the socket behind a virtio-serial port; QEMU serves one at a time."""
        return self._connect(handle, parts.channel_socket(name), f"channel {name!r}")

    def _connect(self, handle: VmHandle, socket_name: str, what: str) -> int:
        peer = Socket(socket.AF_UNIX)
        try:
            peer.connect(os.fspath(self._socket(handle, socket_name)))
        except OSError as error:
            peer.close()
            raise VmIOError(f"VM {handle.name!r}: its {what} cannot be reached: {error.strerror}", vm_name=handle.name) from error
        return peer.detach()

    def info(self, handle: VmHandle) -> dict[str, object]:
        """Return QEMU's version and the VM's state, as QMP has them."""
        return {"version": self._qmp(handle, ("query-version", {})), "status": self._qmp(handle, ("query-status", {}))}

    def counters(self, handle: VmHandle) -> dict[str, object]:
        """Return what was read and written of each disk."""
        return {"blockstats": self._qmp(handle, ("query-blockstats", {}))}

    def event_log(self, handle: VmHandle) -> Path | None:
        """Return the file that the second monitor writes."""
        return None if handle.run_dir is None else qemu_events.event_log(handle.run_dir)

    def trouble(self, handle: VmHandle) -> VmError | None:
        """Return the error of a full disk of the host, or of the first reboot, shutdown or panic that nobody asked for."""
        events = self._events_of(handle)
        trouble = events.read()
        if trouble is None and events.stopped_by is not None:
            return self._full_disk(handle, events.stopped_by)
        return trouble

    def _events_of(self, handle: VmHandle) -> qemu_events.QemuEvents:
        fresh = qemu_events.QemuEvents(handle.name, self.event_log(handle) or Path(os.devnull))
        return self._events.setdefault(handle.machine_id, fresh)

    def _full_disk(self, handle: VmHandle, event: dict[str, Any]) -> VmError:
        node = str(event.get("node-name"))
        try:
            nodes: Any = self._qmp(handle, ("query-named-block-nodes", {"flat": True}))
            file = next((str(each["file"]) for each in nodes if each.get("node-name") == node), node)
        except VmError as error:
            file = f"{node!r} ({error})"
        return HypervisorError(
            f"VM {handle.name!r}: its disk {file} could not take what the guest wrote: {event.get('reason')}. QEMU has paused the "
            "guest until there is space: free some on that file system and resume() the VM, or put the image, or CHVM_CACHE_DIR "
            "for the overlay of a root_disk, where there is more.",
            vm_name=handle.name,
        )

    def add_disk(self, handle: VmHandle, image: Path, *, read_only: bool) -> str:
        """Plug a disk in; returns its id."""
        form = image_format(image, read_only=read_only)
        return devices.add_disk(handle, self._socket(handle, "qmp.sock"), image, form, read_only=read_only)

    def add_tap(self, handle: VmHandle, tap: str, mac: str) -> str:
        """Plug a NIC in that is attached to a TAP; returns its id."""
        return devices.add_tap(handle, self._socket(handle, "qmp.sock"), tap, mac)

    def add_share(self, handle: VmHandle, share: SharedDir, socket_path: Path) -> str:
        """Plug a shared dir in whose virtiofsd listens at `socket_path`; returns its id."""
        return devices.add_share(handle, self._socket(handle, "qmp.sock"), share, socket_path)

    def remove_device(self, handle: VmHandle, device: str) -> None:
        """Unplug a device and wait until the guest has let go of it."""
        devices.remove_device(handle, self._socket(handle, "qmp.sock"), device)

    def resize(self, handle: VmHandle, *, cpus: int | None, memory_mb: int | None) -> None:
        """Add processors and memory, up to `max_cpus` and `max_memory_mb`."""
        devices.resize(handle, self._socket(handle, "qmp.sock"), cpus=cpus, memory_mb=memory_mb)

    def open_vsock(self, handle: VmHandle, port: int) -> socket.socket:
        """Return a stream connected to a vsock port of the guest's, through the host's kernel."""
        return qemu_vsock.connect(handle.name, self._cid(handle), port)

    def listen_vsock(self, handle: VmHandle, port: int) -> socket.socket:
        """Return a listener at a vsock port of the host's, which all VMs of the machine share."""
        return qemu_vsock.listen(handle.name, self._cid(handle), port)

    def _cid(self, handle: VmHandle) -> int:
        place = f"/machine/peripheral/{qemu_vsock.DEVICE}"
        try:
            cid = self._qmp(handle, ("qom-get", {"path": place, "property": "guest-cid"}))
        except HypervisorError as error:
            raise qemu_vsock.refuse(handle.name) from error
        assert isinstance(cid, int)
        return cid

    def forward_port(self, handle: VmHandle, port: int) -> tuple[str, int]:
        """Return a port on the host's loopback, chosen by the kernel, that leads to a port of the guest."""
        answer = self._qmp(handle, ("human-monitor-command", {"command-line": f"hostfwd_add net0 tcp:127.0.0.1:0-:{port}"}))
        listing = str(self._qmp(handle, ("human-monitor-command", {"command-line": "info usernet"})))
        return qmp.forwarded_port(handle.name, str(answer), listing, port)

    def dump_memory(self, handle: VmHandle, target: Path) -> None:
        """Write the guest's memory to an ELF core."""
        qemu_dump.dump(handle.name, self._socket(handle, "qmp.sock"), target)

    def why_no_debugger(self, config: VmConfig) -> str | None:
        """Return None: its stub is always there."""

    def pause(self, handle: VmHandle) -> None:
        """Stop the guest's processors."""
        self._qmp(handle, ("stop", {}))
        self._process.set_paused(handle, True)

    def resume(self, handle: VmHandle) -> None:
        """Let a paused guest go on."""
        self._qmp(handle, ("cont", {}))
        self._process.set_paused(handle, False)

    def power_button(self, handle: VmHandle) -> None:
        """Press the ACPI power button."""
        self._qmp(handle, ("system_powerdown", {}))

    def allow_reboot(self, handle: VmHandle, shares: Sequence[ServedShare]) -> tuple[VmHandle, list[ServedShare]]:
        """Allow the guest's next reboot, at which `-no-reboot` would otherwise end QEMU."""
        self._events_of(handle).expected_reboots += 1
        self._qmp(handle, ("set-action", {"reboot": "reset"}))
        return handle, list(shares)

    def settle(self, handle: VmHandle) -> None:
        """Treat all that has happened to the guest so far as handled; its next reboot ends QEMU again."""
        self._qmp(handle, ("set-action", {"reboot": "shutdown"}))
        self._events_of(handle).settle()

    def run_state(self, handle: VmHandle) -> str | None:
        """Return QEMU's run state where it is another than `running`."""
        ask = lambda client: client.execute("query-status")  # noqa: E731
        answer = qmp.session(handle.name, self._socket(handle, "qmp.sock"), ask, timeout_s=RUN_STATE_TIMEOUT_S)
        state = str(answer.get("status")) if isinstance(answer, dict) else str(answer)
        return None if state == "running" else state

    def snapshot(self, handle: VmHandle, directory: Path) -> None:
        """Save a paused VM's state, and its memory and what it has written to its root disk, unless these are files here already.

        What QEMU knows of a disk is in its file while the VM is paused (`vm_stop` of its cpus.c flushes all).
        """
        shared = (directory / MEMORY_FILE).exists()
        assert handle.run_dir is not None
        if (written := handle.run_dir / ROOT_FILE).exists():
            copy_overlay(written, directory / ROOT_FILE)
        save_empty_disks(handle.run_dir, directory)
        qemu_state.save(handle.name, self._socket(handle, "qmp.sock"), directory / "state", memory_is_shared=shared)

    def restore(self, config: VmConfig, directory: Path, options: BootOptions = DEFAULT_OPTIONS) -> VmHandle:
        """Start a VM from a snapshot's directory and return it running; it writes nothing there."""
        handle = self._process.boot(config, self._command, options, directory)

        async def go_on(client: Any) -> None:
            assert handle.run_dir is not None
            await qemu_disks.plug(client, handle, plugged_files(config, handle.run_dir))
            for index, share in enumerate(config.shared_dirs):
                await devices.plug_share(client, handle, share, self._socket(handle, f"fs{index}.sock"))
            await client.execute("cont")

        with self._process.restoring(handle, self.kill):
            shared = (directory / MEMORY_FILE).exists()
            qmp_socket, state = self._socket(handle, "qmp.sock"), directory / "state"
            qemu_state.load(handle.name, qmp_socket, state, options.restore_timeout_s, memory_is_shared=shared, then=go_on)
        return handle

    def _qmp(self, handle: VmHandle, command: tuple[str, dict[str, object]]) -> object:
        return qmp.execute(handle.name, self._socket(handle, "qmp.sock"), *command)

    @staticmethod
    def _socket(handle: VmHandle, name: str) -> Path:
        if handle.run_dir is None:
            raise VmNotFoundError(f"VM {handle.name!r}: the handle names no run directory", vm_name=handle.name)
        return handle.run_dir / name


DRIVER = QemuDriver

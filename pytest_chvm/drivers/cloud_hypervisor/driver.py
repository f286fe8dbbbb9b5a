"""Cloud Hypervisor, v52 or newer: booted by its command line, which a person can repeat, then asked over its API."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path

from pytest_chvm.base.deadline import Deadline
from pytest_chvm.base.untouched import Socket
from pytest_chvm.base.watch import FileWatch
from pytest_chvm.drivers.base import (
    Abilities,
    BootsFirmware,
    Console,
    Debugs,
    Describes,
    DumpsMemory,
    Plugs,
    PowerButton,
    Reboots,
    Resizes,
    Saves,
    VmDriver,
    Vsock,
    Watches,
    logger,
    share_id,
)
from pytest_chvm.drivers.boot import DEFAULT_OPTIONS, MEMORY_FILE, Boot, BootOptions, VmmCommand
from pytest_chvm.drivers.cloud_hypervisor import api as ch_api
from pytest_chvm.drivers.cloud_hypervisor import disks as ch_disks
from pytest_chvm.drivers.cloud_hypervisor import dump as ch_dump
from pytest_chvm.drivers.cloud_hypervisor import landlock as ch_landlock
from pytest_chvm.drivers.cloud_hypervisor import parts, state
from pytest_chvm.drivers.cloud_hypervisor.disks import quoted
from pytest_chvm.drivers.cloud_hypervisor.events import EventMonitor
from pytest_chvm.drivers.cloud_hypervisor.firmware import find_firmware
from pytest_chvm.drivers.disks import DiskFile, default_cmdline, disk_files, image_format, plugged_files, save_empty_disks
from pytest_chvm.drivers.events import event_log, open_event_log
from pytest_chvm.drivers.keys import binary_key
from pytest_chvm.drivers.memory import copy_sparse, inherited_memory
from pytest_chvm.drivers.process import VmmProcess
from pytest_chvm.drivers.taps import taps_of
from pytest_chvm.errors import HypervisorError, InvalidConfigError, VmError, VmIOError, VmNotFoundError
from pytest_chvm.host import versions
from pytest_chvm.host.binaries import Binary, find_binary
from pytest_chvm.host.host import Host, default_host
from pytest_chvm.host.kvm import is_in_lab, require_nested_kvm, why_no_kvm
from pytest_chvm.model import DiskKind, ServedShare, SharedDir, VmConfig, VmHandle, VmStatus

PLACES = ("/usr/bin", "/usr/local/bin")
INSTALL = "install it from https://github.com/cloud-hypervisor/cloud-hypervisor/releases, or name one with --chvm-binary"
RESTORE_DIR = "restore"
UNPLUG_TIMEOUT_S = 20.0
# In the lab a guest sets which registers XSAVE saves without KVM being asked: QEMU emulates no intercept of XSETBV (7.2). So KVM
# gives the sizes of others; the guest's kernel warns of an "XSAVE consistency problem" (arch/x86/kernel/fpu/xstate.c), and does
# without.
WITHOUT_XSAVE = "noxsave"


class CloudHypervisorDriver(
    VmDriver, Saves, Console, Describes, Watches, Reboots, BootsFirmware, Plugs, Resizes, Vsock, DumpsMemory, Debugs, PowerButton
):
    """Runs VMs with Cloud Hypervisor, which needs KVM."""

    vmm = "cloud-hypervisor"
    # What does not fit into the PTY it keeps until the guest writes more, which it would not. A PTY's buffers take 8 KiB (the
    # limit of pty_common_install(), drivers/tty/pty.c) and what is in the line discipline.
    abilities = Abilities(disk_buses=ch_disks.BUSES, iommu="VIRTIO_IOMMU", nested=True, spare_slots=8, console_piece=1 << 13)

    def __init__(
        self, *, accel: str = "auto", binary: Path | None = None, virtiofsd: Path | None = None, host: Host | None = None
    ) -> None:
        if accel not in ("auto", "kvm"):
            raise InvalidConfigError(f"accel={accel!r}: Cloud Hypervisor has KVM only; use --chvm-vmm=qemu for software")
        self._binary = binary
        self._process = VmmProcess(self, ("cloud-hypervisor",), virtiofsd, host or default_host())
        self._monitors: dict[str, EventMonitor] = {}
        # The PTYs of clones, until the console is opened.
        self._consoles: dict[str, int] = {}

    def binary(self) -> Binary:
        """Return the executable; raises InvalidConfigError where there is none, or only one older than v52."""
        found = find_binary("cloud-hypervisor", PLACES, INSTALL, self._binary)
        versions.check_program(found, "cloud-hypervisor", "leave out --chvm-vmm=cloud-hypervisor, or name another --chvm-binary")
        if versions.version_of(found) is None:
            logger.warning("%s says of itself %r, which names no version: v52 or newer is expected", found.path, found.version)
        versions.require(found, versions.Feature.CLONES_OF_CLOUD_HYPERVISOR, INSTALL)
        return found

    def why_not(self) -> str | None:
        """Return why "auto" should not choose Cloud Hypervisor on this machine."""
        reason = why_no_kvm()
        if reason is not None:
            return f"no usable KVM: {reason}"
        try:
            self.binary()
        except InvalidConfigError as error:
            return str(error)
        return None

    def snapshot_key(self) -> list[str]:
        """Return the parts of Cloud Hypervisor that a snapshot depends on."""
        return [self.vmm, *binary_key(self.binary())]

    def failure_hint(self) -> str | None:
        """Return why no guest runs here, where that is so."""
        reason = why_no_kvm()
        return f"No usable KVM here: {reason}. Use --chvm-vmm=qemu, or 'chvm lab -- pytest ...'." if reason else None

    def firmware(self) -> list[Path]:
        """Return its own build of EDK II, or Rust Hypervisor Firmware; raises MissingRequirementError where there is neither."""
        return [find_firmware()]

    def boot(self, config: VmConfig, options: BootOptions = DEFAULT_OPTIONS) -> VmHandle:
        """Start a VM and return at once, STARTING."""
        return self._process.boot(config, self._command, options)

    def _command(self, boot: Boot) -> VmmCommand:
        config = boot.config
        for path in (config.kernel_image, config.initramfs, *(disk.image for disk in config.disks_with_images), boot.serial_log):
            _check_text(config, path)
        machine = [*(["ip", "netns", "exec", config.netns] if config.netns else []), os.fspath(self.binary().path)]
        cmdline = default_cmdline(config) if config.cmdline is None else config.cmdline
        if config.firmware is not None:
            machine += ["--firmware", *map(os.fspath, self.firmware())]
        else:
            words = f"{cmdline} {WITHOUT_XSAVE}" if is_in_lab() else cmdline
            machine += ["--kernel", os.fspath(config.kernel or ""), "--cmdline", words]
        if config.initramfs is not None:
            machine += ["--initramfs", os.fspath(config.initramfs)]
        if config.nested:
            require_nested_kvm(config.name)
        machine += [*parts.processors(config), *parts.memory(boot), *parts.small_devices(config)]
        machine += ch_disks.arguments(disk_files(boot))
        taps = taps_of(boot)
        for tap in taps:
            machine += ["--net", f"tap={tap.name},mac={tap.mac}"]
        machine += ["--serial", f"file={quoted(boot.serial_log)}", "--console", "pty" if boot.options.console else "off"]
        for share, path in zip(config.shared_dirs, boot.share_sockets, strict=True):
            machine += ["--fs", f"tag={share.tag},socket={quoted(path)},num_queues=1,queue_size=512"]
        machine += config.vmm_args
        # With it the guest's panic is an event.
        control = [*self._control(boot), *parts.debugger(boot), *(["--pvpanic"] if boot.options.console else [])]
        if ch_landlock.is_confined(boot):
            rules = [f"path={quoted(path)},access={access}" for path, access in ch_landlock.rules(boot, taps)]
            control += ["--landlock", "--landlock-rules", *rules]
        return VmmCommand(machine, control, event_log(boot.lease.directory))

    @staticmethod
    def _control(boot: Boot) -> list[str]:
        events = boot.add_fd(open_event_log(boot.lease.directory))
        return ["--api-socket", f"fd={boot.add_listener('api.sock')}", "--event-monitor", f"fd={events}"]

    def stop(self, handle: VmHandle) -> None:
        """End the VMM with SIGTERM, after 10 s with SIGKILL, and remove all that the VM had."""
        self._forget(handle)
        self._process.stop(handle)

    def kill(self, handle: VmHandle) -> None:
        """End the VMM with SIGKILL and remove all that the VM had."""
        self._forget(handle)
        self._process.kill(handle)

    def _forget(self, handle: VmHandle) -> None:
        self._monitors.pop(handle.machine_id, None)
        if (console := self._consoles.pop(handle.machine_id, None)) is not None:
            os.close(console)

    def state(self, handle: VmHandle) -> VmStatus:
        """Return what has become of a VM."""
        return self._process.state(handle)

    def open_console(self, handle: VmHandle) -> int:
        """Return the PTY that is the guest's virtio console."""
        console = self._consoles.pop(handle.machine_id, None)
        return self._open_pty(handle) if console is None else console

    def _open_pty(self, handle: VmHandle) -> int:
        import termios
        import tty

        config = self.info(handle).get("config")
        console = config.get("console") if isinstance(config, dict) else None
        path = console.get("file") if isinstance(console, dict) else None
        if not isinstance(path, str) or not re.fullmatch(r"/dev/pts/\d+", path):
            raise VmIOError(f"VM {handle.name!r} has no console: Cloud Hypervisor says {console!r}", vm_name=handle.name)
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            tty.setraw(fd)
        except termios.error as error:
            os.close(fd)
            raise VmIOError(f"VM {handle.name!r}: its console {path} cannot be used: {error}", vm_name=handle.name) from error
        return fd

    def info(self, handle: VmHandle) -> dict[str, object]:
        """Return the VM's configuration and state, as `vm.info` has them."""
        return self._call(handle, "vm.info", ask=True)

    def counters(self, handle: VmHandle) -> dict[str, object]:
        """Return what each device has counted, as `vm.counters` has it."""
        return self._call(handle, "vm.counters", ask=True)

    def event_log(self, handle: VmHandle) -> Path | None:
        """Return the file that the event monitor writes."""
        return None if handle.run_dir is None else event_log(handle.run_dir)

    def trouble(self, handle: VmHandle) -> VmError | None:
        """Return the first reboot, shutdown or panic that nobody asked for."""
        return self._monitor(handle).read()

    def _monitor(self, handle: VmHandle) -> EventMonitor:
        fresh = EventMonitor(handle.name, self.event_log(handle) or Path(os.devnull))
        return self._monitors.setdefault(handle.machine_id, fresh)

    def add_disk(self, handle: VmHandle, image: Path, *, read_only: bool) -> str:
        """Plug a disk in; returns its id."""
        kind = DiskKind("image", "", read_only=read_only)
        return self._add(handle, "vm.add-disk", ch_disks.body(DiskFile(kind, image, image_format(image, read_only=read_only))))

    def add_tap(self, handle: VmHandle, tap: str, mac: str) -> str:
        """Plug a NIC in that is attached to a TAP; returns its id."""
        return self._add(handle, "vm.add-net", {"tap": tap, "mac": mac})

    def add_share(self, handle: VmHandle, share: SharedDir, socket_path: Path) -> str:
        """Plug a shared dir in whose virtiofsd listens at `socket_path`; returns its id."""
        body: dict[str, object] = {"id": share_id(share), "tag": share.tag, "socket": os.fspath(socket_path)}
        body |= {"num_queues": 1, "queue_size": 512}
        return self._add(handle, "vm.add-fs", body)

    def _add(self, handle: VmHandle, endpoint: str, body: dict[str, object]) -> str:
        answer = self._call(handle, endpoint, body)
        if not isinstance(answer.get("id"), str):
            raise HypervisorError(f"VM {handle.name!r}: {endpoint} named no device: {str(answer)[:200]}", vm_name=handle.name)
        return str(answer["id"])

    def remove_device(self, handle: VmHandle, device: str) -> None:
        """Unplug a device and wait until the guest has let go of it; raises HypervisorError where it does not."""
        assert handle.process is not None
        events, deadline = self.event_log(handle), Deadline.after(UNPLUG_TIMEOUT_S)
        assert events is not None
        monitor = self._monitor(handle)
        with FileWatch(events) as watch:
            monitor.read()
            monitor.removed.clear()
            self._call(handle, "vm.remove-device", {"id": device})
            while not any(name == device or name.endswith(f"-{device}") for name in monitor.removed):
                if watch.wait(deadline, handle.process.pid) or deadline.expired:
                    raise HypervisorError(
                        f"VM {handle.name!r}: the guest did not let go of {device!r} within {UNPLUG_TIMEOUT_S:g} s",
                        vm_name=handle.name,
                    )
                monitor.read()

    def resize(self, handle: VmHandle, *, cpus: int | None, memory_mb: int | None) -> None:
        """Set the number of processors and the amount of memory, up to `max_cpus` and `max_memory_mb`."""
        body: dict[str, object] = {}
        if cpus is not None:
            body["desired_vcpus"] = cpus
        if memory_mb is not None:
            body["desired_ram"] = memory_mb << 20
        self._call(handle, "vm.resize", body)

    def open_vsock(self, handle: VmHandle, port: int) -> socket.socket:
        """Return a stream connected to a vsock port of the guest's (docs/vsock.md: CONNECT over the VMM's UNIX socket)."""
        return ch_api.connect_vsock(handle.name, self._vsock(handle), port)

    def listen_vsock(self, handle: VmHandle, port: int) -> socket.socket:
        """Return a listener at the UNIX socket that stands for a vsock port of the host's."""
        listener = Socket(socket.AF_UNIX)
        listener.bind(f"{self._vsock(handle)}_{port}")
        listener.listen()
        return listener

    def _vsock(self, handle: VmHandle) -> Path:
        assert handle.run_dir is not None
        path = handle.run_dir / "vsock.sock"
        if not path.exists():
            # CIDs may repeat among VMs: each has its own UNIX socket.
            self._call(handle, "vm.add-vsock", {"cid": 3, "socket": os.fspath(path)})
        return path

    def dump_memory(self, handle: VmHandle, target: Path) -> None:
        """Write the guest's memory to an ELF core, where this was built with that; raises UnsupportedError elsewhere."""
        ch_dump.dump(handle.name, lambda endpoint, body: self._call(handle, endpoint, body), target, paused=self._is_paused(handle))

    def _is_paused(self, handle: VmHandle) -> bool:
        return self.info(handle).get("state") == "Paused"

    def why_no_debugger(self, config: VmConfig) -> str | None:
        """Return why a debugger cannot be attached to a VM."""
        return parts.why_no_debugger(self.binary().path, config)

    def pause(self, handle: VmHandle) -> None:
        """Stop the guest's processors."""
        self._call(handle, "vm.pause")
        self._process.set_paused(handle, True)

    def resume(self, handle: VmHandle) -> None:
        """Let a paused guest go on."""
        self._call(handle, "vm.resume")
        self._process.set_paused(handle, False)

    def power_button(self, handle: VmHandle) -> None:
        """Press the ACPI power button."""
        self._call(handle, "vm.power-button")

    def allow_reboot(self, handle: VmHandle, shares: Sequence[ServedShare]) -> tuple[VmHandle, list[ServedShare]]:
        """Expect the next reboot: the same process makes all devices anew, and connects to each virtiofsd again."""
        self._monitor(handle).expected_reboots += 1
        return self._process.renew_sidecars(handle, shares)

    def settle(self, handle: VmHandle) -> None:
        """Treat all that has happened to the guest so far as handled."""
        self._monitor(handle).settle()

    def run_state(self, handle: VmHandle) -> str | None:
        """Return the VM's state where it is another than `Running`."""
        state = self.info(handle).get("state")
        return None if state in ("Running", None) else str(state)

    def snapshot(self, handle: VmHandle, directory: Path) -> None:
        """Save a paused VM's state and memory to an existing directory, empty but for a memory file; disks are not saved."""
        assert handle.run_dir is not None
        save_empty_disks(handle.run_dir, directory)
        self._call(handle, "vm.snapshot", {"destination_url": f"file://{directory}"})
        state.stop_clock(directory)
        memory = directory / MEMORY_FILE
        if not memory.exists() and handle.process is not None:
            # Cloud Hypervisor does not save shared memory, which a VM with shared dirs has (a copy of its own).
            shared = inherited_memory(handle.process.pid)
            if shared is not None:
                with memory.open("xb") as file:
                    copy_sparse(shared, file.fileno())

    def restore(self, config: VmConfig, directory: Path, options: BootOptions = DEFAULT_OPTIONS) -> VmHandle:
        """Start a VM from a snapshot's directory and return it running; it writes nothing there."""
        handle = self._process.boot(config, self._restore_command, options, directory)
        with self._process.restoring(handle, self.kill):
            assert handle.run_dir is not None
            assert handle.process is not None
            source = handle.run_dir / RESTORE_DIR
            if shared := inherited_memory(handle.process.pid):
                state.name_memory(source, shared)
            self._call(handle, "vm.restore", {"source_url": f"file://{source}"})
            for file in plugged_files(config, handle.run_dir):
                self._add(handle, "vm.add-disk", ch_disks.body(file))
            for index, share in enumerate(config.shared_dirs):
                self.add_share(handle, share, handle.run_dir / f"fs{index}.sock")
            if options.console:
                # While nobody has opened it, the VMM looks for that each half second (virtio-devices/src/console.rs).
                self._consoles[handle.machine_id] = self._open_pty(handle)
            self._call(handle, "vm.resume")
        return handle

    def _restore_command(self, boot: Boot) -> VmmCommand:
        assert boot.restoring is not None
        state.make_source(boot, boot.restoring, boot.lease.directory / RESTORE_DIR, taps_of(boot))
        namespace = ["ip", "netns", "exec", boot.config.netns] if boot.config.netns else []
        program, events = os.fspath(self.binary().path), event_log(boot.lease.directory)
        return VmmCommand([*namespace, program], self._control(boot), events, prints_console=True)

    def _call(
        self, handle: VmHandle, endpoint: str, body: dict[str, object] | None = None, *, ask: bool = False
    ) -> dict[str, object]:
        if handle.run_dir is None:
            raise VmNotFoundError(f"VM {handle.name!r}: the handle names no run directory", vm_name=handle.name)
        return ch_api.call(handle.name, handle.run_dir / "api.sock", endpoint, body, ask=ask)


def _check_text(config: VmConfig, path: Path | None) -> None:
    # Its argument parser is Rust's, which takes UTF-8 only.
    try:
        os.fspath(path or "").encode()
    except UnicodeEncodeError as error:
        raise InvalidConfigError(
            f"VM {config.name!r}: the path {os.fsencode(path or '')!r} is not valid UTF-8, which Cloud Hypervisor cannot take: "
            "rename it",
            vm_name=config.name,
        ) from error


DRIVER = CloudHypervisorDriver

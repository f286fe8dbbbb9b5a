"""What a driver is.

A driver turns a `VmConfig` into a command line and speaks its VMM's control protocol. It never waits for the
guest, and never chooses what is started.
"""

from __future__ import annotations

import logging
import socket
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pytest_chvm.drivers.boot import DEFAULT_OPTIONS, BootOptions
from pytest_chvm.errors import InvalidConfigError, MissingRequirementError, UnsupportedError, VmError
from pytest_chvm.host.binaries import Binary
from pytest_chvm.model import ServedShare, SharedDir, VmConfig, VmHandle, VmStatus

if TYPE_CHECKING:
    from pytest_chvm.guest.kernels.kernel import Kernel

logger = logging.getLogger("pytest_chvm")

# A PCI bus has 32 places, of which the machine and what every VM has take up to eleven, and room for hotplug eight.
MOST_DEVICES, MOST_DEVICES_WITH_HOTPLUG = 21, 13


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a VMM has that no method of its driver shows.

    `user_network`, `multicast_network`: networks that need nothing of the host's. `cpu_models`: `cpu` chooses one.
    `other_architectures`: guests of another one than this machine's run too.
    `live_root_disk`: all of a root disk is in its file while the VM is paused, so that it can go on after a snapshot.
    `disk_buses`: the buses that a `Disk` can be on. `block_sizes`: blocks of a disk may be larger than 512 bytes.
    `without_rng`: there can be a VM without a virtio-rng. `nested`: a guest can have guests of its own.
    `iommu`: the option of a kernel's configuration by which Linux uses the IOMMU that is emulated, None where none is.
    `spare_slots`: for how many devices a VM with `hotplug` has places.
    `console_piece`: how many bytes of a command's output may be on their way to us over the virtio console at once.
    """

    user_network: bool = False
    multicast_network: bool = False
    cpu_models: bool = False
    other_architectures: bool = False
    live_root_disk: bool = False
    disk_buses: frozenset[str] = frozenset({"virtio"})
    block_sizes: bool = False
    without_rng: bool = False
    nested: bool = False
    iommu: str | None = None
    spare_slots: int = 0
    console_piece: int = 1 << 13


class VmDriver(Protocol):
    """A VMM. Thread-safe. A driver is a subclass and defines what is abstract; the other methods raise UnsupportedError.

    Each further thing that a VMM may be able to do is a protocol below, which the driver names among its bases.
    """

    vmm: str
    abilities: Abilities

    @abstractmethod
    def why_not(self) -> str | None:
        """Return why "auto" should not choose this VMM on this machine, or None where it may."""

    @abstractmethod
    def binary(self) -> Binary:
        """Return the VMM's executable; raises InvalidConfigError where there is none that works."""

    def failure_hint(self) -> str | None:
        """Return what a person should know of this machine when the VMM has failed on it."""
        return None

    @abstractmethod
    def boot(self, config: VmConfig, options: BootOptions = DEFAULT_OPTIONS) -> VmHandle:
        """Start a VM and return at once, STARTING; whatever fails leaves nothing behind."""

    @abstractmethod
    def stop(self, handle: VmHandle) -> None:
        """End the VMM with SIGTERM, after 10 s with SIGKILL, and remove all that the VM had."""

    @abstractmethod
    def kill(self, handle: VmHandle) -> None:
        """End the VMM with SIGKILL and remove all that the VM had."""

    @abstractmethod
    def state(self, handle: VmHandle) -> VmStatus:
        """Return what has become of a VM; asking changes nothing."""

    def pause(self, handle: VmHandle) -> None:
        """Stop the guest's processors."""
        raise unsupported(self.vmm, handle.name, "pause a guest")

    def resume(self, handle: VmHandle) -> None:
        """Let a paused guest go on."""
        raise unsupported(self.vmm, handle.name, "let a guest go on")

    def snapshot(self, handle: VmHandle, directory: Path) -> None:
        """Save a paused VM's state and memory to a directory; disks are not saved."""
        raise unsupported(self.vmm, handle.name, SAVE)

    def restore(self, config: VmConfig, directory: Path, options: BootOptions = DEFAULT_OPTIONS) -> VmHandle:
        """Start a VM from a snapshot's directory and return it running; it writes nothing there.

        `config` may differ from the snapshot's in names, logs, the other end of each NIC, and shared dirs, which are plugged in.
        """
        raise unsupported(self.vmm, config.name, SAVE)


@runtime_checkable
class Saves(Protocol):
    """`snapshot` and `restore` work, so that templates can be made, and clones of them."""

    def snapshot_key(self) -> list[str]:
        """Return the parts of the VMM (version, firmware) that a snapshot depends on."""


@runtime_checkable
class Console(Protocol):
    """The guest has a virtio console, on which its shell is."""

    def open_console(self, handle: VmHandle) -> int:
        """Return a descriptor of the guest's virtio console, for the shell."""


@runtime_checkable
class Channels(Protocol):
    """The guest has virtio-serial ports: `channels` of the config."""

    def open_channel(self, handle: VmHandle, name: str) -> int:
        """Return a descriptor of the host's end of one of the config's channels."""


@runtime_checkable
class Describes(Protocol):
    """The VMM can be asked about a VM."""

    def info(self, handle: VmHandle) -> dict[str, object]:
        """Return what the VMM says of the VM, in its own words."""

    def counters(self, handle: VmHandle) -> dict[str, object]:
        """Return what the VMM has counted of each device, in its own words."""


@runtime_checkable
class Watches(Protocol):
    """The VMM reports by itself what happens to the guest."""

    def event_log(self, handle: VmHandle) -> Path | None:
        """Return the file to which the VMM appends its events, where it keeps one."""

    def trouble(self, handle: VmHandle) -> VmError | None:
        """Return the first error that the VMM has reported of the guest (panic, reboot, full disk), or None."""

    def run_state(self, handle: VmHandle) -> str | None:
        """Return the run state in the VMM's words where the guest is not running; None where it runs."""


@runtime_checkable
class Reboots(Protocol):
    """A guest can start again in the same VMM."""

    def allow_reboot(self, handle: VmHandle, shares: Sequence[ServedShare]) -> tuple[VmHandle, list[ServedShare]]:
        """Allow the next reboot of the guest, which would otherwise end the VMM or count as an error.

        Returns the handle from then on, and who serves the shared dirs, `shares` until now.
        """

    def settle(self, handle: VmHandle) -> None:
        """Treat all that has happened to the guest so far as handled; its next reboot is an error again."""


@runtime_checkable
class BootsFirmware(Protocol):
    """A disk's own boot loader can be booted, by UEFI firmware."""

    def firmware(self) -> list[Path]:
        """Return the files of the firmware; raises MissingRequirementError where none is installed."""


@runtime_checkable
class Plugs(Protocol):
    """Devices come and go while the guest runs."""

    def add_disk(self, handle: VmHandle, image: Path, *, read_only: bool) -> str:
        """Plug a disk in; returns its id."""

    def add_tap(self, handle: VmHandle, tap: str, mac: str) -> str:
        """Plug a NIC in that is attached to a TAP; returns its id."""

    def add_share(self, handle: VmHandle, share: SharedDir, socket_path: Path) -> str:
        """Plug a shared dir in whose virtiofsd listens at `socket_path`; returns its id."""

    def remove_device(self, handle: VmHandle, device: str) -> None:
        """Unplug a device that was plugged in."""


@runtime_checkable
class Resizes(Protocol):
    """Processors and memory come and go while the guest runs."""

    def resize(self, handle: VmHandle, *, cpus: int | None, memory_mb: int | None) -> None:
        """Give the VM another number of processors or amount of memory."""


@runtime_checkable
class Vsock(Protocol):
    """Guest and host have sockets to each other without a network."""

    def open_vsock(self, handle: VmHandle, port: int) -> socket.socket:
        """Return a stream connected to a vsock port of the guest's."""

    def listen_vsock(self, handle: VmHandle, port: int) -> socket.socket:
        """Return a listener that the guest reaches at a vsock port of the host's (CID 2)."""


@runtime_checkable
class ForwardsPorts(Protocol):
    """Ports of a guest on the user-mode network can be reached."""

    def forward_port(self, handle: VmHandle, port: int) -> tuple[str, int]:
        """Return where on the host a port of a guest on the user-mode network can be reached."""


@runtime_checkable
class DumpsMemory(Protocol):
    """A guest's memory can be written to a file."""

    def dump_memory(self, handle: VmHandle, target: Path) -> None:
        """Write the guest's memory to an ELF core, of a VM that runs, is paused or has panicked; it goes on as before."""


@runtime_checkable
class Debugs(Protocol):
    """A debugger can be attached: it is listened for at `GDB_SOCKET` in the run directory of a VM with `gdb`."""

    def why_no_debugger(self, config: VmConfig) -> str | None:
        """Return why it cannot be to this VM, or None where it can."""


@runtime_checkable
class PowerButton(Protocol):
    """The machine has a power button."""

    def power_button(self, handle: VmHandle) -> None:
        """Press the power button; what that does is the guest's to decide."""


@runtime_checkable
class AbleDriver(
    VmDriver,
    Saves,
    Console,
    Channels,
    Describes,
    Watches,
    Reboots,
    BootsFirmware,
    Plugs,
    Resizes,
    Vsock,
    ForwardsPorts,
    DumpsMemory,
    Debugs,
    PowerButton,
    Protocol,
):
    """A driver with every ability."""


SAVE = "save a VM, or start a saved one"
# Of each ability, the end of a sentence that begins with "cannot".
IN_WORDS: dict[type, str] = {
    Saves: SAVE,
    Console: "give a guest a virtio console, which commands and files go over",
    Channels: "give a guest virtio-serial ports (channels)",
    Describes: "be asked about a VM",
    Watches: "report what happens to a guest",
    Reboots: "have a guest start again",
    BootsFirmware: "boot a disk by UEFI firmware",
    Plugs: "plug devices in and out",
    Resizes: "change processors or memory of a guest that runs",
    Vsock: "give a guest a vsock",
    ForwardsPorts: "forward a port to a guest on a user-mode network",
    DumpsMemory: "write a guest's memory to a file",
    Debugs: "have a debugger attached",
    PowerButton: "press a guest's power button",
}


def unsupported(vmm: str, vm_name: str, what: str, instead: str = "use another VMM (--chvm-vmm)") -> UnsupportedError:
    """Return the error of a VMM that cannot do something; `what` is the end of a sentence that begins with "cannot"."""
    return UnsupportedError(f"VM {vm_name!r}: {vmm} cannot {what}: {instead}", vm_name=vm_name)


def method_of(driver: VmDriver, name: str, vm_name: str) -> Any:
    """Return an attribute of a driver; raises UnsupportedError, naming the VMM, for one of an ability that it does not have."""
    if not hasattr(driver, name):
        for ability, words in IN_WORDS.items():
            if hasattr(ability, name):
                raise unsupported(driver.vmm, vm_name, words)
    return getattr(driver, name)


def check_abilities(driver: VmDriver, config: VmConfig, kernel: Kernel | None = None) -> None:
    """Raise UnsupportedError, or InvalidConfigError, for the first thing that the VMM does not have, whatever the host has.

    `kernel` is the guest's, where it is known: MissingRequirementError is raised where that has no driver for the VMM's IOMMU.
    """
    _check_devices(config)
    able = driver.abilities
    if config.cpu is not None and not able.cpu_models:
        raise unsupported(driver.vmm, config.name, "choose the model of a processor", "leave out cpu")
    if config.channels and not isinstance(driver, Channels):
        raise unsupported(driver.vmm, config.name, IN_WORDS[Channels], "leave out channels")
    if config.firmware is not None and not isinstance(driver, BootsFirmware):
        raise unsupported(driver.vmm, config.name, IN_WORDS[BootsFirmware])
    if not config.rng and not able.without_rng:
        raise unsupported(driver.vmm, config.name, "make a VM without a virtio-rng", "leave out rng")
    if config.nested and not able.nested:
        raise unsupported(driver.vmm, config.name, "have a guest with guests of its own, of this architecture", "leave out nested")
    if config.iommu and able.iommu is None:
        raise unsupported(driver.vmm, config.name, "give a VM an IOMMU", "leave out iommu")
    if config.gdb:
        _check_debugger(driver, config)
    _check_disks(driver, config)
    for network in config.networks or ():
        if network.ability is not None and not getattr(able, network.ability):
            raise unsupported(
                driver.vmm, config.name, "have a network without a TAP", "run as root, which can make TAPs, or use --chvm-vmm=qemu"
            )
    if config.iommu and kernel is not None:
        _check_iommu(driver, config, kernel)


def _check_iommu(driver: VmDriver, config: VmConfig, kernel: Kernel) -> None:
    """Raise MissingRequirementError where a kernel is known not to use the IOMMU: behind it nothing would work."""
    from pytest_chvm.guest.kernels.config import config_of

    option, known = driver.abilities.iommu, config_of(kernel)
    if known is not None and option is not None and known.get(option, "n") == "n":
        raise MissingRequirementError(
            f"VM {config.name!r}: iommu=True, and its kernel lacks CONFIG_{option}: choose another kernel, or another VMM",
            vm_name=config.name,
        )


def _check_debugger(driver: VmDriver, config: VmConfig) -> None:
    why = driver.why_no_debugger(config) if isinstance(driver, Debugs) else "it has no stub"
    if why is not None:
        raise unsupported(driver.vmm, config.name, f"{IN_WORDS[Debugs]} ({why})")


def _check_disks(driver: VmDriver, config: VmConfig) -> None:
    able = driver.abilities
    for disk in config.all_disks:
        if disk.kind.bus not in able.disk_buses:
            there = " or ".join(sorted(able.disk_buses))
            raise unsupported(
                driver.vmm, config.name, f"have {disk} on bus {disk.kind.bus!r}", f"use {there}, or another VMM (--chvm-vmm)"
            )
        if disk.kind.block_size != 512 and not able.block_sizes:
            raise unsupported(
                driver.vmm, config.name, f"give {disk} blocks of {disk.kind.block_size} bytes", "leave out block_size"
            )


def _check_devices(config: VmConfig) -> None:
    count = len(config.networks or ()) + len(config.shared_dirs) + len(config.all_disks)
    most = MOST_DEVICES_WITH_HOTPLUG if config.hotplug else MOST_DEVICES
    if count > most:
        raise InvalidConfigError(
            f"VM {config.name!r}: {count} NICs, disks and shared dirs, and a VM has room for {most}"
            f"{' with hotplug=True' if config.hotplug else ''}: share a directory that is above several",
            vm_name=config.name,
        )


def share_id(share: SharedDir) -> str:
    """Return what a VMM calls the device of a shared dir that was plugged in."""
    return f"fs-{share.tag}"

"""A VM's configuration."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from pytest_chvm.base.choices import Arch
from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.model.architecture import Architecture, architecture, why_no_architecture
from pytest_chvm.model.clone_facts import CloneFact, checked_facts
from pytest_chvm.model.disks import DISK_KINDS, AnyDisk, Disk, VmDisk, all_disks
from pytest_chvm.model.host_root import HostRoot
from pytest_chvm.model.machine import Cpus, Gdb, checked_vmm_args, why_no_cpus
from pytest_chvm.model.modules import checked_modules
from pytest_chvm.model.networks import Attachment, SocketPairFd, Tap
from pytest_chvm.model.seeds import SEED_FIELDS, seed_text
from pytest_chvm.model.shares import SharedDir
from pytest_chvm.model.values import NAME_PATTERN, _short, as_kernel, as_path

if TYPE_CHECKING:
    from pytest_chvm.model.arguments import ConfigArguments

CPU_MODEL_PATTERN = re.compile(r"[A-Za-z0-9._-]+(,[+-]?[A-Za-z0-9._=-]+)*")
CHANNEL_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class VmConfig:
    """All that a VM is made of. Every field has a default: `VmConfig()` is the built-in guest.

    Paths are `str` or `os.PathLike` in, `Path` out. `memory_mb` is MiB. Raises InvalidConfigError for a
    value that can never be right; files are looked at when the VM is started.

    A field that has its default value counts as not given: `launch` and `chvm_vm` then take the value from the marker, the options
    or the test's name. To insist on a default value, give it as an argument: `launch(config, cpus=1)`.

    `kernel` is an image, a directory that has one, or a word: `host`, `debian:6.1`, which is the one relative path that there is;
    of a VM that was started it is the image. `cmdline` takes the place of the default kernel command line, `cmdline_extra` is added
    to the one or the other.
    `arch` is the processor architecture, as `uname -m` names it (None: this machine's); another one is emulated.
    `modules` are loaded when the VM is ready, each as `modprobe` takes it: "btrfs", "dummy numdummies=2".
    `root="host"`, or a `HostRoot`: the guest's root is the host's, read-only, below a layer that goes with the VM.
    `cpus` is their number, or `Cpus` with sockets, threads and NUMA nodes. `cpu` is QEMU's `-cpu`, a model and its flags
    ("max,-avx2"); None: the host's processor with KVM, all that QEMU can do without. `cpu_model` is its earlier name.
    `hugepages`: the memory is on free hugepages of the host's. `nested`: the guest can have guests of its own, by `/dev/kvm`.
    `rng`, `balloon`, `iommu`: whether it has a virtio-rng, a virtio-balloon, an IOMMU. `gdb`: a debugger can be attached, by
    `vm.gdb_command`; with "wait" the VM is returned stopped at its first instruction.
    `vmm_args` are further words of the VMM's command line, a last resort: nobody looks at them.
    `channels` are names of virtio-serial ports: `/dev/virtio-ports/<name>` in the guest where udev runs, `vm.open_channel(name)`
    outside. `hotplug`: there is room for devices to be plugged in while it runs; `max_cpus` and `max_memory_mb`: up to how much
    `vm.resize` can go (None: no further). `outbound=False`: by its user-mode network the guest reaches
    neither the host nor what the host reaches; it can still be reached at `vm.address`.

    `disks` are further disks, each a `Disk`: after the others, in their order.

    `user_data`, `meta_data` and `network_config`, text or mapping in and text out, are what an image's cloud-init is told, by a
    NoCloud seed. `firmware="uefi"` boots the boot loader of the `root_disk`.

    `clone_must_have`: what has to be as after a boot, of `model.clone_facts`; where a clone's is not, the VM is booted.
    """

    name: str = "vm"
    namespace: str = "default"
    kernel: Path | None = None
    initramfs: Path | None = None
    cmdline: str | None = None
    cmdline_extra: str | None = None
    modules: tuple[str, ...] = ()
    cpus: int | Cpus = 1
    memory_mb: int = 256
    root: Literal["host"] | HostRoot | None = None
    root_disk: Path | None = None
    seed_iso: Path | None = None
    user_data: str | None = None
    meta_data: str | None = None
    network_config: str | None = None
    data_disk: Path | None = None
    disks: tuple[Disk, ...] = ()
    networks: tuple[Attachment, ...] | None = None
    netns: str | None = None
    shared_dirs: tuple[SharedDir, ...] = ()
    serial_log: Path | None = None
    arch: Arch | None = None
    cpu: str | None = None
    cpu_model: str | None = None
    hugepages: bool = False
    nested: bool = False
    rng: bool = True
    balloon: bool = False
    iommu: bool = False
    gdb: Gdb = False
    vmm_args: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    hotplug: bool = False
    max_cpus: int | None = None
    max_memory_mb: int | None = None
    outbound: bool = True
    firmware: str | None = None
    clone_must_have: tuple[CloneFact, ...] = ()

    if TYPE_CHECKING:
        # What comes in is more than what comes out: a `str` is a path too.
        def __init__(self, **arguments: Unpack[ConfigArguments]) -> None: ...

    def __post_init__(self) -> None:
        for key in ("name", "namespace"):
            value = getattr(self, key)
            if not isinstance(value, str) or not NAME_PATTERN.fullmatch(value):
                raise InvalidConfigError(
                    f"{key}={_short(value)} cannot be a VM's {key}: expected 1 to 63 letters, digits, "
                    "'-', '_' or '.', beginning with a letter or digit",
                    vm_name=value if key == "name" and isinstance(value, str) else None,
                )
        if self.kernel is not None:
            object.__setattr__(self, "kernel", as_kernel("kernel", self.kernel))
        for key in ("initramfs", *(kind.field for kind in DISK_KINDS), "serial_log"):
            value = getattr(self, key)
            if value is not None:
                object.__setattr__(self, key, as_path(key, value))
        self._check_guest()
        self._check_machine()
        for key in ("cmdline", "cmdline_extra"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, str):
                raise self._invalid(f"{key}={value!r}, expected a string")
            if value is not None and ("\n" in value or "\0" in value):
                raise self._invalid(f"{key} has a newline or NUL, which no kernel command line can have")
        if self.netns is not None and (
            not isinstance(self.netns, str) or not re.fullmatch(r"[^/\s\0]{1,255}", self.netns) or self.netns in (".", "..")
        ):
            raise self._invalid(f"netns={self.netns!r} cannot be the name of a network namespace")
        try:
            object.__setattr__(self, "clone_must_have", checked_facts(self.clone_must_have))
            object.__setattr__(self, "vmm_args", checked_vmm_args(self.vmm_args))
        except InvalidConfigError as error:
            raise self._invalid(str(error)) from error
        object.__setattr__(self, "channels", self._checked_channels())
        object.__setattr__(self, "modules", checked_modules(f"VM {self.name!r}: modules", self.modules))
        object.__setattr__(self, "disks", self._checked_disks())
        object.__setattr__(self, "networks", self._checked_networks())
        object.__setattr__(self, "shared_dirs", self._checked_shared_dirs())

    def _check_machine(self) -> None:
        if isinstance(self.memory_mb, bool) or not isinstance(self.memory_mb, int) or self.memory_mb < 1:
            raise self._invalid(f"memory_mb={self.memory_mb!r}, expected a whole number of 1 or more")
        if (why := why_no_cpus(self.cpus, self.memory_mb, self.max_cpus)) is not None:
            raise self._invalid(why)
        for key, least in (("max_cpus", self.processors), ("max_memory_mb", self.memory_mb)):
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise self._invalid(f"{key}={value!r}, expected a whole number, {least} or more")
        for key in ("outbound", "hugepages", "nested", "rng", "balloon", "iommu"):
            if not isinstance(value := getattr(self, key), bool):
                raise self._invalid(f"{key}={value!r}, expected True or False")
        if self.gdb not in (True, False, "wait"):
            raise self._invalid(f"gdb={self.gdb!r}, expected True, False or 'wait'")
        if self.cpu is not None and self.cpu_model is not None:
            raise self._invalid(f"cpu={self.cpu!r} and cpu_model={self.cpu_model!r}, which are the same: leave cpu_model out")
        object.__setattr__(self, "cpu", self.cpu_model if self.cpu is None else self.cpu)
        object.__setattr__(self, "cpu_model", None)
        if self.cpu is not None and (not isinstance(self.cpu, str) or not CPU_MODEL_PATTERN.fullmatch(self.cpu)):
            raise self._invalid(f"cpu={self.cpu!r}, expected a model and its flags: 'EPYC,+svm'")

    def _check_guest(self) -> None:
        self._check_arch()
        if self.root is not None and self.root != "host" and not isinstance(self.root, HostRoot):
            raise self._invalid(f"root={self.root!r}, expected 'host' or a HostRoot")
        if self.root is not None and self.root_disk is not None:
            raise self._invalid("root='host' and a root_disk, and a guest has one root: leave one of them out")
        if self.firmware not in (None, "uefi"):
            raise self._invalid(f"firmware={self.firmware!r}, expected 'uefi'")
        others = [key for key in ("kernel", "initramfs", "cmdline", "cmdline_extra", "root") if getattr(self, key) is not None]
        if self.firmware is not None and others:
            raise self._invalid(f"firmware='uefi' boots what is on the root_disk: leave out {' and '.join(others)}")
        for key in SEED_FIELDS:
            if (value := getattr(self, key)) is not None:
                try:
                    object.__setattr__(self, key, seed_text(key, value))
                except InvalidConfigError as error:
                    raise self._invalid(str(error)) from error

    def _check_arch(self) -> None:
        if (why := why_no_architecture(self.arch)) is not None:
            raise self._invalid(why)
        if self.root is not None and not self.architecture.is_host:
            raise self._invalid(
                f"arch={self.arch!r} and root='host', whose programs are for {platform.machine()}: leave one of them out"
            )

    def _invalid(self, what: str) -> InvalidConfigError:
        return InvalidConfigError(f"VM {self.name!r}: {what}", vm_name=self.name)

    def _checked_channels(self) -> tuple[str, ...]:
        channels: Any = self.channels
        if isinstance(channels, str) or not isinstance(channels, Sequence):
            raise self._invalid(f"channels={channels!r}, expected a list of names")
        for name in channels:
            if not isinstance(name, str) or not CHANNEL_PATTERN.fullmatch(name):
                raise self._invalid(f"channel {name!r}: expected 1 to 64 letters, digits, '-', '_' or '.'")
        if len(set(channels)) != len(channels):
            raise self._invalid(f"channels has a name twice: {', '.join(channels)}")
        return tuple(channels)

    def _checked_disks(self) -> tuple[Disk, ...]:
        disks: Any = self.disks
        if disks is None:
            return ()
        if isinstance(disks, Disk):
            disks = (disks,)
        if not isinstance(disks, Sequence) or isinstance(disks, str | bytes):
            raise self._invalid(f"disks={disks!r}, expected a list of Disk")
        for disk in disks:
            if not isinstance(disk, Disk):
                raise self._invalid(f"disks has {disk!r}, expected a Disk")
        serials = [disk.serial for disk in disks if disk.serial is not None]
        if len(set(serials)) != len(serials):
            raise self._invalid(f"disks has a serial twice: {', '.join(serials)}")
        return tuple(disks)

    def _checked_networks(self) -> tuple[Attachment, ...] | None:
        networks: Any = self.networks
        if networks is None:
            return None
        if isinstance(networks, Attachment | SocketPairFd):
            networks = (networks,)
        if not isinstance(networks, Sequence) or isinstance(networks, str):
            raise self._invalid(f"networks={networks!r}, expected a list of Tap or Network")
        for network in networks:
            if isinstance(network, SocketPairFd):
                raise self._invalid("a socket-pair network works on macOS only, not on Linux: use a Tap")
            if not isinstance(network, Attachment):
                raise self._invalid(f"networks has {network!r}, expected a Tap or a Network")
        named = [n.name for n in networks if isinstance(n, Tap) and n.name is not None]
        if len(set(named)) != len(named):
            raise self._invalid(f"networks uses a TAP twice: {', '.join(named)}")
        return tuple(networks)

    def _checked_shared_dirs(self) -> tuple[SharedDir, ...]:
        shared: Any = self.shared_dirs
        if shared is None:
            return ()
        if isinstance(shared, SharedDir):
            shared = (shared,)
        if isinstance(shared, Mapping):
            shared = [SharedDir(tag, host_path) for tag, host_path in shared.items()]
        if not isinstance(shared, Sequence) or isinstance(shared, str | bytes):
            raise self._invalid(f"shared_dirs={shared!r}, expected a mapping of tag to host path or a list of SharedDir")
        for share in shared:
            if not isinstance(share, SharedDir):
                raise self._invalid(f"shared_dirs has {share!r}, expected a SharedDir")
        tags = [share.tag for share in shared]
        for tag in tags:
            if tags.count(tag) > 1:
                raise self._invalid(f"shared dir tag {tag!r} is used twice")
        return tuple(shared)

    @property
    def architecture(self) -> Architecture:
        """Its processor architecture."""
        return architecture(self.arch)

    @property
    def processors(self) -> int:
        """How many processors it is booted with."""
        return self.cpus.count if isinstance(self.cpus, Cpus) else self.cpus

    @property
    def topology(self) -> Cpus:
        """Its processors in full: of a number of them each has a socket of its own, on one NUMA node."""
        return self.cpus if isinstance(self.cpus, Cpus) else Cpus(sockets=self.cpus)

    @property
    def all_disks(self) -> tuple[AnyDisk, ...]:
        """The disks that a VM is booted with, of every kind, in the order in which the guest sees them."""
        named = ((kind, getattr(self, kind.field)) for kind in DISK_KINDS)
        first = (VmDisk(kind, image) for kind, image in named if image is not None)
        return all_disks(first, self.disks)

    @property
    def disks_with_images(self) -> tuple[VmDisk, ...]:
        """Those of them that are made of an image."""
        return tuple(disk for disk in self.all_disks if isinstance(disk, VmDisk))

    @property
    def seed_texts(self) -> dict[str, str]:
        """What cloud-init is told, by the names of a seed's files."""
        return {name: text for key, name in SEED_FIELDS.items() if (text := getattr(self, key)) is not None}

    def given(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, by name."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) != each.default}

    @property
    def kernel_image(self) -> Path | None:
        """The kernel's file, None where the config has none; raises InvalidConfigError where its kernel is a word."""
        if self.kernel is not None and not self.kernel.is_absolute():
            raise self._invalid(
                f"kernel={str(self.kernel)!r}: launch() and chvm_vm() know what that is, a driver needs an image's path"
            )
        return self.kernel

    def replace(self, **changes: Unpack[ConfigArguments]) -> VmConfig:
        """Return a copy with some fields changed, validated anew."""
        values: dict[str, Any] = {**changes}
        return replace(self, **values)


CONFIG_FIELDS = tuple(f.name for f in fields(VmConfig))
# Keyword arguments of a launch that are not part of what the VM is.
LAUNCH_FIELDS = ("vmm", "accel", "network", "boot", "boot_timeout", "ready_marker", "wait")


def check_argument_names(given: Mapping[str, object]) -> None:
    """Raise InvalidConfigError for an argument that no VM has, listing the near ones."""
    known = CONFIG_FIELDS + LAUNCH_FIELDS
    for key in given:
        if key not in known:
            near = get_close_matches(key, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}"
            raise InvalidConfigError(f"a VM has no argument {key!r}; {hint}")

"""What a VM is made of, as frozen data, and the validation of it.

Here is checked all that can be said without looking at the host: types, ranges, names. What depends on
the host (does the file exist, is the memory there) is checked by `pytest_chvm.host.preflight`.
Nothing in this module starts, opens or writes anything.
"""

from __future__ import annotations

import enum
import hashlib
import ipaddress
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

from pytest_chvm.errors import InvalidConfigError

if TYPE_CHECKING:
    from pytest_chvm.model.arguments import ConfigArguments

StrPath = str | os.PathLike[str]

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
# 36 bytes is what virtio-fs has room for (virtio 1.2, 5.11.4); the name is also a directory of the guest.
TAG_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,35}")
# IFNAMSIZ is 16 with the final NUL; the kernel refuses "/", ":" and white space, and ip(8) takes a leading "-" for an option.
INTERFACE_PATTERN = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,14}")
CPU_MODEL_PATTERN = re.compile(r"[A-Za-z0-9._-]+(,[+-]?[A-Za-z0-9._=-]+)*")
CHANNEL_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,64}")
CACHE_POLICIES = ("never", "auto", "always")
MAC_PATTERN = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


class VmState(enum.StrEnum):
    """Where a VM is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    READY = "ready"
    PAUSED = "paused"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class VmStatus:
    """A VM's state, and its IP once the ready marker was seen."""

    state: VmState
    ip: str | None = None


@dataclass(frozen=True, slots=True)
class SharedDir:
    """A host directory the guest sees over virtio-fs; the built-in guest mounts it at `/mnt/<tag>`.

    `cache`: how long the guest may keep what it has read: "never" sees the host's changes at once, "auto" within a
    second, "always" maybe never. `announce_submounts`: the guest sees what is mounted below as mounts of its own; overlayfs cannot
    look into those.
    """

    tag: str
    host_path: Path
    read_only: bool = False
    cache: str = "never"
    announce_submounts: bool = True

    if TYPE_CHECKING:

        def __init__(
            self,
            tag: str,
            host_path: StrPath,
            read_only: bool = False,
            cache: Literal["never", "auto", "always"] = "never",
            announce_submounts: bool = True,
        ) -> None: ...

    def __post_init__(self) -> None:
        if not isinstance(self.tag, str) or not TAG_PATTERN.fullmatch(self.tag):
            raise InvalidConfigError(
                f"shared dir tag {self.tag!r} cannot be a tag: expected 1 to 36 letters, digits, "
                "'-', '_' or '.', not beginning with '.' or '-'"
            )
        object.__setattr__(self, "host_path", as_path("shared_dirs", self.host_path))
        if not isinstance(self.read_only, bool):
            raise InvalidConfigError(f"shared dir {self.tag!r}: read_only={self.read_only!r}, expected True or False")
        if self.cache not in CACHE_POLICIES:
            raise InvalidConfigError(f"shared dir {self.tag!r}: cache={self.cache!r}, expected one of {', '.join(CACHE_POLICIES)}")

    @property
    def guest_word(self) -> str:
        """What the built-in guest is told of it: `TAG[,ro]`."""
        return f"{self.tag},ro" if self.read_only else self.tag


@dataclass(frozen=True, slots=True)
class Tap:
    """A TAP interface of the host as the other end of a guest's NIC.

    `name=None`: one is made with a name of its own. One that does not exist is made and removed by us;
    one that does is somebody else's and is left, unless `take_over`. `mac=None`: derived from the VM's name.
    """

    name: str | None = None
    mac: str | None = None
    take_over: bool = False

    def __post_init__(self) -> None:
        if self.name is not None and (
            not isinstance(self.name, str) or not INTERFACE_PATTERN.fullmatch(self.name) or self.name in (".", "..")
        ):
            raise InvalidConfigError(
                f"TAP name {self.name!r} cannot be an interface name: expected 1 to 15 letters, digits, "
                "'-', '_' or '.', not beginning with '-'"
            )
        if self.mac is not None:
            object.__setattr__(self, "mac", checked_mac(self.mac))


@dataclass(frozen=True, slots=True)
class SocketPairFd:
    """One end of a socket pair as the other end of a guest's NIC (not on Linux: use a TAP)."""

    fd: int


@dataclass(frozen=True, slots=True)
class Network:
    """An isolated L2 network for several VMs of one test; made by the fixture `chvm_network`.

    `subnet` is where its VMs' addresses are from; the host has the first one where `bridge` names a
    bridge of the host, and has none where it is None (`multicast`, a group and port on loopback
    over which QEMU carries the frames, is set instead).
    """

    name: str
    subnet: ipaddress.IPv4Network
    bridge: str | None = None
    multicast: str | None = None


@dataclass(frozen=True, slots=True)
class UserNetwork:
    """QEMU's user-mode network: `subnet` exists inside the VMM only.

    At `host` the guest reaches what listens on the host's loopback, and beyond it what the host reaches; nothing of that without
    `outbound`.
    """

    subnet: ipaddress.IPv4Network
    host: ipaddress.IPv4Address
    guest: ipaddress.IPv4Address
    mac: str | None = None
    outbound: bool = True


Attachment = Tap | SocketPairFd | Network | UserNetwork


@dataclass(frozen=True, slots=True)
class NicAddress:
    """What the guest's NIC is told on its kernel command line: `address` has the prefix length."""

    address: ipaddress.IPv4Interface
    gateway: ipaddress.IPv4Address | None = None


@dataclass(frozen=True, slots=True)
class VmConfig:
    """All that a VM is made of. Every field has a default: `VmConfig()` is the built-in guest.

    Paths are `str` or `os.PathLike` in, `Path` out. `memory_mb` is MiB. Raises InvalidConfigError for a
    value that can never be right; files are looked at when the VM is started.

    A field that is as by default is one that was not given: to `launch` and `chvm_vm` its value then comes from the marker, the
    options or the test's name. What is to be as by default whatever those say is an argument beside it: `launch(config, cpus=1)`.

    `cpu_model` is QEMU's `-cpu`, a model and its flags; None: the host's processor with KVM, all that QEMU can do without.
    `channels` are names of virtio-serial ports: `/dev/virtio-ports/<name>` in the guest where udev runs, `vm.open_channel(name)`
    outside. `hotplug`: there is room for devices to be plugged in while it runs; `max_cpus` and `max_memory_mb`: up to how much
    `vm.resize` can go (None: no further). `outbound=False`: by its user-mode network the guest reaches
    neither the host nor what the host reaches; it can still be reached at `vm.address`.
    """

    name: str = "vm"
    namespace: str = "default"
    kernel: Path | None = None
    initramfs: Path | None = None
    cmdline: str | None = None
    cpus: int = 1
    memory_mb: int = 256
    root_disk: Path | None = None
    seed_iso: Path | None = None
    data_disk: Path | None = None
    networks: tuple[Attachment, ...] | None = None
    netns: str | None = None
    shared_dirs: tuple[SharedDir, ...] = ()
    serial_log: Path | None = None
    cpu_model: str | None = None
    channels: tuple[str, ...] = ()
    hotplug: bool = False
    max_cpus: int | None = None
    max_memory_mb: int | None = None
    outbound: bool = True

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
        for key in ("kernel", "initramfs", "root_disk", "seed_iso", "data_disk", "serial_log"):
            value = getattr(self, key)
            if value is not None:
                object.__setattr__(self, key, as_path(key, value))
        for key in ("cpus", "memory_mb"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise self._invalid(f"{key}={value!r}, expected a whole number of 1 or more")
        for key, least in (("max_cpus", self.cpus), ("max_memory_mb", self.memory_mb)):
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise self._invalid(f"{key}={value!r}, expected a whole number, {least} or more")
        if not isinstance(self.outbound, bool):
            raise self._invalid(f"outbound={self.outbound!r}, expected True or False")
        if self.cmdline is not None:
            if not isinstance(self.cmdline, str):
                raise self._invalid(f"cmdline={self.cmdline!r}, expected a string")
            if "\n" in self.cmdline or "\0" in self.cmdline:
                raise self._invalid("cmdline has a newline or NUL, which no kernel command line can have")
        if self.netns is not None and (
            not isinstance(self.netns, str) or not re.fullmatch(r"[^/\s\0]{1,255}", self.netns) or self.netns in (".", "..")
        ):
            raise self._invalid(f"netns={self.netns!r} cannot be the name of a network namespace")
        if self.cpu_model is not None and (not isinstance(self.cpu_model, str) or not CPU_MODEL_PATTERN.fullmatch(self.cpu_model)):
            raise self._invalid(f"cpu_model={self.cpu_model!r}, expected a model and its flags: 'EPYC,+svm'")
        object.__setattr__(self, "channels", self._checked_channels())
        object.__setattr__(self, "networks", self._checked_networks())
        object.__setattr__(self, "shared_dirs", self._checked_shared_dirs())

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

    def _checked_networks(self) -> tuple[Attachment, ...] | None:
        networks: Any = self.networks
        if networks is None:
            return None
        if isinstance(networks, Attachment):
            networks = (networks,)
        if not isinstance(networks, Sequence) or isinstance(networks, str):
            raise self._invalid(f"networks={networks!r}, expected a list of Tap, SocketPairFd or Network")
        for network in networks:
            if not isinstance(network, Attachment):
                raise self._invalid(f"networks has {network!r}, expected a Tap, a SocketPairFd or a Network")
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

    def given(self) -> dict[str, Any]:
        """Return the fields that say something, by name: those that are not as by default. The rest is for others to say."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) != each.default}

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


def as_path(key: str, value: object) -> Path:
    """Return `value` as an absolute Path; raises InvalidConfigError where it cannot be one."""
    if isinstance(value, bytes):
        value = os.fsdecode(value)
    if not isinstance(value, str | os.PathLike):
        raise InvalidConfigError(f"{key}={value!r}, expected a path (str or os.PathLike)")
    text = os.fsdecode(value)
    if not text or "\0" in text:
        raise InvalidConfigError(f"{key}={text!r} cannot be a path: it is empty or has a NUL")
    return Path(os.path.abspath(text))


def checked_mac(value: object) -> str:
    """Return a MAC address in lower case; raises InvalidConfigError where it is none, or is multicast."""
    mac = value.lower() if isinstance(value, str) else ""
    if not MAC_PATTERN.fullmatch(mac):
        raise InvalidConfigError(f"mac={value!r} is no MAC address: expected six bytes like 52:54:00:12:34:56")
    if int(mac[:2], 16) & 1:
        raise InvalidConfigError(f"mac={value!r} is a multicast address: the first byte of a NIC's must be even")
    if mac == "00:00:00:00:00:00":
        raise InvalidConfigError(f"mac={value!r} is no NIC's address: it is all zeros")
    return mac


def mac_for(vm_name: str, index: int) -> str:
    """Return the MAC of a VM's NIC number `index`, the same on every run.

    QEMU's prefix and the first three bytes of the SHA-256 of the name (`NAME#1` for the second NIC).
    """
    key = vm_name if index == 0 else f"{vm_name}#{index}"
    digest = hashlib.sha256(key.encode()).digest()
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process that cannot be mistaken for a later one with the same pid.

    `start_time_ticks` is field 22 of `/proc/PID/stat` (proc(5)), in clock ticks since the host's boot.
    """

    pid: int
    start_time_ticks: int | None = None


@dataclass(frozen=True, slots=True)
class VmHandle:
    """What is needed to find, ask and end a VM, also from another process: it survives JSON."""

    name: str
    namespace: str
    vmm: str
    state: VmState
    process: ProcessIdentity | None
    serial_log: Path
    machine_id: str
    run_dir: Path | None = None
    ready_marker: str = "CHVM_READY"
    nonce: str | None = None
    taps: tuple[str, ...] = ()
    netns: str | None = None
    sidecars: tuple[ProcessIdentity, ...] = ()
    command: tuple[str, ...] = field(default=(), repr=False)

    @property
    def vmm_log(self) -> Path:
        """Where the VMM's own stdout and stderr go."""
        return self.serial_log.with_suffix(".vmm.log")

    def to_json(self) -> str:
        """Return the handle as a JSON object."""
        values = asdict(self)
        values["serial_log"] = os.fspath(self.serial_log)
        values["run_dir"] = None if self.run_dir is None else os.fspath(self.run_dir)
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the handle that `to_json` wrote; raises InvalidConfigError where the text is none."""
        try:
            values = json.loads(text)
            values["state"] = VmState(values["state"])
            values["process"] = values["process"] and ProcessIdentity(**values["process"])
            values["serial_log"] = Path(values["serial_log"])
            values["run_dir"] = Path(values["run_dir"]) if values.get("run_dir") else None
            values["taps"] = tuple(values.get("taps", ()))
            values["sidecars"] = tuple(ProcessIdentity(**p) for p in values.get("sidecars", ()))
            values["command"] = tuple(values.get("command", ()))
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidConfigError(
                f"this is no VmHandle: {type(error).__name__}: {error}; expected what VmHandle.to_json() wrote"
            ) from error


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What a command in the guest did. Nothing is stripped from its outputs.

    `stdout` and `stderr` are `stdout_bytes` and `stderr_bytes` as UTF-8, undecodable bytes by
    `surrogateescape`. `returncode` is the shell's: 128 + N for a command that signal N ended.
    """

    command: str | tuple[str, ...]
    returncode: int
    stdout_bytes: bytes
    stderr_bytes: bytes
    duration_s: float

    @property
    def stdout(self) -> str:
        """Standard output as text."""
        return self.stdout_bytes.decode(errors="surrogateescape")

    @property
    def stderr(self) -> str:
        """Standard error as text."""
        return self.stderr_bytes.decode(errors="surrogateescape")


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"

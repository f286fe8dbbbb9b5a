"""The arguments of `chvm_vm`, `launch` and `VmConfig`, as type checkers see them.

What they mean and which values they take is said, and checked, by `VmConfig` and `Settings`; a test holds the names together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from pytest_chvm.base.choices import Accel, Arch, BootWay, NetworkMode, Vmm
from pytest_chvm.model import Attachment, Cpus, Disk, HostRoot, SharedDir, StrPath
from pytest_chvm.model.clone_facts import CloneFact


class ConfigArguments(TypedDict, total=False):
    """The fields of `VmConfig`, in the forms that it takes."""

    name: str
    namespace: str
    arch: Arch | None
    kernel: StrPath | None
    initramfs: StrPath | None
    cmdline: str | None
    cmdline_extra: str | None
    modules: Sequence[str]
    cpus: int | Cpus
    memory_mb: int
    root: Literal["host"] | HostRoot | None
    root_disk: StrPath | None
    seed_iso: StrPath | None
    user_data: str | Mapping[str, object] | None
    meta_data: str | Mapping[str, object] | None
    network_config: str | Mapping[str, object] | None
    data_disk: StrPath | None
    disks: Sequence[Disk] | Disk
    networks: Sequence[Attachment] | Attachment | None
    netns: str | None
    shared_dirs: Mapping[str, StrPath] | Sequence[SharedDir] | SharedDir
    serial_log: StrPath | None
    cpu: str | None
    cpu_model: str | None
    hugepages: bool
    nested: bool
    rng: bool
    balloon: bool
    iommu: bool
    gdb: bool | Literal["wait"]
    vmm_args: Sequence[str]
    channels: Sequence[str]
    hotplug: bool
    outbound: bool
    firmware: Literal["uefi"] | None
    max_cpus: int | None
    max_memory_mb: int | None
    clone_must_have: Sequence[CloneFact]


class VmArguments(ConfigArguments, total=False):
    """Those of a launch too, but for `wait`."""

    vmm: Vmm | None
    accel: Accel | None
    network: NetworkMode | None
    boot: BootWay | None
    boot_timeout: float | None
    ready_marker: str | None

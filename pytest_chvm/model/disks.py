"""The disks that a VM has, and of what kind each is, a `DiskKind`. The checks of their images are in `drivers/images.py`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.model.values import StrPath, as_path

DiskBus = Literal["virtio", "nvme", "scsi", "nvdimm", "pmem"]
# Those on which a disk is memory: raw, mapped, and with neither blocks nor a serial number.
MEMORY_BUSES = ("nvdimm", "pmem")
# No VMM saves the state of a controller of this one.
UNSAVED_BUSES = ("nvme",)
# The largest one is a page, the most that Linux takes.
BLOCK_SIZES = (512, 1024, 2048, 4096)
# virtio-blk (VIRTIO_BLK_ID_BYTES) and NVMe (Identify Controller, SN) have room for 20 bytes.
SERIAL_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,20}")
# Linux makes memory of persistent memory in steps of 2 MiB (memremap_compat_align, x86).
MEMORY_STEP_MB = 2


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of a VM's: the image at `path`, which keeps what the guest writes, or an empty one of `size_mb` MiB.

    An empty one is there for the VM alone and goes with it; what was written before a snapshot its clones have too, each a disk of
    its own. `block_size` is in bytes, logical and physical. `serial` is what the guest finds it by: `/sys/block/*/serial`, for
    NVMe `/sys/block/*/device/serial`, for SCSI page 0x80 of its vital product data. `bus` is how it is attached: "virtio"
    (`/dev/vda`), "nvme" (`/dev/nvme0n1`), "scsi" (virtio-scsi, `/dev/sda`); "nvdimm" (ACPI) and "pmem" (virtio-pmem) are memory
    that lasts, `/dev/pmem0`. Raises InvalidConfigError for what no disk can be.
    """

    path: Path | None = None
    size_mb: int | None = None
    read_only: bool = False
    block_size: int = 512
    serial: str | None = None
    bus: DiskBus = "virtio"

    if TYPE_CHECKING:

        def __init__(
            self,
            path: StrPath | None = None,
            size_mb: int | None = None,
            read_only: bool = False,
            block_size: int = 512,
            serial: str | None = None,
            bus: DiskBus = "virtio",
        ) -> None: ...

    def __post_init__(self) -> None:
        if self.path is not None:
            object.__setattr__(self, "path", as_path("Disk(path)", self.path))
        if (why := self._why_not()) is not None:
            raise InvalidConfigError(f"{self}: {why}")

    def _why_not(self) -> str | None:
        if (self.path is None) == (self.size_mb is None):
            return "expected either a path, of an image, or size_mb, of an empty disk"
        if self.size_mb is not None and (isinstance(self.size_mb, bool) or not isinstance(self.size_mb, int) or self.size_mb < 1):
            return "expected a size_mb of 1 or more, a whole number"
        if not isinstance(self.read_only, bool):
            return "expected read_only to be True or False"
        if self.bus not in get_args(DiskBus):
            return f"expected a bus that is one of {', '.join(get_args(DiskBus))}"
        if self.block_size not in BLOCK_SIZES:
            return f"expected a block_size that is one of {', '.join(map(str, BLOCK_SIZES))}"
        if self.serial is not None and (not isinstance(self.serial, str) or not SERIAL_PATTERN.fullmatch(self.serial)):
            return "expected a serial of 1 to 20 letters, digits, '-', '_' or '.'"
        return self._why_no_memory() if self.bus in MEMORY_BUSES else None

    def _why_no_memory(self) -> str | None:
        if self.read_only or self.serial is not None or self.block_size != 512:
            return f"a disk of bus {self.bus!r} is memory: leave out read_only, serial and block_size"
        if (self.size_mb or 0) % MEMORY_STEP_MB:
            return f"a disk of bus {self.bus!r} is memory, and Linux takes {MEMORY_STEP_MB} MiB at a time: choose an even size_mb"
        return None


@dataclass(frozen=True, slots=True)
class DiskKind:
    """What a disk is for, and what the guest has it as.

    `field`: the one of `VmConfig` that names its image, and what errors call it. `id`: the VMM's name for it.
    `throwaway`: the guest's writes go to an overlay that ends with the VM. `awaited`: the built-in guest waits for it.
    """

    field: str
    id: str
    read_only: bool = False
    throwaway: bool = False
    awaited: bool = False
    block_size: int = 512
    serial: str | None = None
    bus: DiskBus = "virtio"


ROOT = DiskKind("root_disk", "root", throwaway=True)
SEED = DiskKind("seed_iso", "seed", read_only=True)
DATA = DiskKind("data_disk", "data", awaited=True)
# All modules of a guest's kernel: what the built-in guest knows it by is in guest/configure.sh. It is behind all others.
MODULES = DiskKind("modules", "modules", read_only=True, serial="chvm-modules")
# In the order in which a guest sees them; after them come those of `disks`.
DISK_KINDS = (ROOT, SEED, DATA)


@dataclass(frozen=True, slots=True)
class VmDisk:
    """A disk of a VM's, and the image that it is made of."""

    kind: DiskKind
    image: Path

    @property
    def written(self) -> bool:
        """Whether the guest's writes stay on the image."""
        return not self.kind.read_only and not self.kind.throwaway

    def __str__(self) -> str:
        """What errors call it."""
        return f"{self.kind.field} {str(self.image)!r}"


@dataclass(frozen=True, slots=True)
class EmptyDisk:
    """A disk of a VM's that is made empty, and goes with the VM."""

    kind: DiskKind
    size_mb: int

    @property
    def written(self) -> bool:
        """False: nothing of it stays."""
        return False

    def __str__(self) -> str:
        """What errors call it."""
        return f"{self.kind.field}, an empty one of {self.size_mb} MiB"


AnyDisk = VmDisk | EmptyDisk


# What Linux calls the disks of a bus: the beginning of a name, and whether a number or a letter follows.
NAMES = {"virtio": ("vd", False), "scsi": ("sd", False), "nvme": ("nvme", True), "nvdimm": ("pmem", True), "pmem": ("pmem", True)}


def all_disks(first: Iterable[AnyDisk], disks: Sequence[Disk]) -> tuple[AnyDisk, ...]:
    """Return the disks of a VM in the order in which the guest sees them: `first`, and those of its config's `disks`.

    The VMM's names for the latter are numbers that a disk has in the VM's template too, where that has it.
    """
    found = [*first, *(_further_disk(number, disk) for number, disk in enumerate(disks))]
    plugged = plugged_into_clones(found)
    numbers = count()
    for disk in [*(each for each in found if each not in plugged), *plugged]:
        if disk.kind not in DISK_KINDS:
            found[found.index(disk)] = replace(disk, kind=replace(disk.kind, id=f"disk{next(numbers)}"))
    return tuple(found)


def _further_disk(number: int, disk: Disk) -> AnyDisk:
    kind = DiskKind(f"disks[{number}]", "", disk.read_only, False, True, disk.block_size, disk.serial, disk.bus)
    if disk.path is not None:
        return VmDisk(kind, disk.path)
    assert disk.size_mb is not None
    return EmptyDisk(kind, disk.size_mb)


def names_in_guest(disks: Iterable[AnyDisk]) -> list[str]:
    """Return what Linux calls each disk, below `/dev`, for disks in the order in which it finds them."""
    seen: Counter[str] = Counter()
    names = []
    for disk in disks:
        prefix, is_number = NAMES[disk.kind.bus]
        index = seen[prefix]
        seen[prefix] += 1
        # Fewer disks than there are letters fit into a VM.
        name = f"{prefix}{index if is_number else chr(ord('a') + index)}"
        names.append(f"{name}n1" if prefix == "nvme" else name)
    return names


def plugged_into_clones(disks: Sequence[AnyDisk]) -> tuple[AnyDisk, ...]:
    """Return the disks that each clone has plugged in, of all that its VM has, in their order.

    Those that are written, whose images a template would write to; those that no VMM saves; and behind one of these all that have
    such a name in the guest: it would find them in another order.
    """
    plugged: list[AnyDisk] = []
    for disk in disks:
        behind = {NAMES[other.kind.bus][0] for other in plugged}
        if disk.written or disk.kind.bus in UNSAVED_BUSES or NAMES[disk.kind.bus][0] in behind:
            plugged.append(disk)
    return tuple(plugged)

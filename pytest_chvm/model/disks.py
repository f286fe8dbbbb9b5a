"""The kinds of disk that a VM has, each a `DiskKind`. The checks of their images are in `drivers/images.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DiskKind:
    """What a disk is for.

    `field`: the one of `VmConfig` that names its image, and what errors call it. `id`: the VMM's name for it.
    `throwaway`: the guest's writes go to an overlay that ends with the VM. `guest_word`: what the built-in guest is told of it.
    """

    field: str
    id: str
    read_only: bool = False
    throwaway: bool = False
    guest_word: str | None = None


ROOT = DiskKind("root_disk", "root", throwaway=True)
SEED = DiskKind("seed_iso", "seed", read_only=True)
# For the built-in guest this is the first disk.
DATA = DiskKind("data_disk", "data", guest_word="chvm.disk=/dev/vda")
# In the order in which a guest sees them.
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

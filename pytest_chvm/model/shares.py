"""Host directories that the guest sees."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.model.values import StrPath, as_path

# 36 bytes is what virtio-fs has room for (virtio 1.2, 5.11.4); the name is also a directory of the guest.
TAG_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,35}")
CACHE_POLICIES = ("never", "auto", "always")


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

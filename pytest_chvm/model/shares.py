"""Host directories that the guest sees."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pytest_chvm.base.text import as_one_word
from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.model.handle import ProcessIdentity
from pytest_chvm.model.values import StrPath, as_path

# 36 bytes is what virtio-fs has room for (virtio 1.2, 5.11.4); the name is also a directory of the guest.
TAG_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,35}")
CACHE_POLICIES = ("never", "auto", "always")


@dataclass(frozen=True, slots=True)
class SharedDir:
    """A host directory the guest sees over virtio-fs; the built-in guest mounts it at `mount`, by default `/mnt/<tag>`.

    `cache`: how long the guest may keep what it has read: "never" sees the host's changes at once, "auto" within a
    second, "always" maybe never. `announce_submounts`: the guest sees what is mounted below as mounts of its own; overlayfs cannot
    look into those. `hidden`: paths of the host's, as `HostRoot` has them, in whose place the guest finds something empty.
    """

    tag: str
    host_path: Path
    read_only: bool = False
    cache: str = "never"
    announce_submounts: bool = True
    mount: str | None = None
    hidden: tuple[str, ...] = ()

    if TYPE_CHECKING:

        def __init__(
            self,
            tag: str,
            host_path: StrPath,
            read_only: bool = False,
            cache: Literal["never", "auto", "always"] = "never",
            announce_submounts: bool = True,
            mount: StrPath | None = None,
            hidden: Sequence[StrPath] = (),
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
        if self.mount is not None:
            object.__setattr__(self, "mount", _checked_mount(self.tag, self.mount))
        object.__setattr__(self, "hidden", checked_hidden(f"shared dir {self.tag!r}", self.hidden))

    @property
    def mount_point(self) -> str:
        """Where the built-in guest mounts it."""
        return self.mount or f"/mnt/{self.tag}"

    @property
    def guest_word(self) -> str:
        """What the built-in guest is told of it: `TAG,ro|rw,PLACE`, the place as `as_one_word` has it."""
        return f"{self.tag},{'ro' if self.read_only else 'rw'},{as_one_word(self.mount_point)}"


def _checked_mount(tag: str, mount: object) -> str:
    place = os.fsdecode(mount) if isinstance(mount, str | os.PathLike) else ""
    if not place.startswith("/") or "\0" in place or "\n" in place or (place := os.path.normpath(place)) in ("/", "//"):
        raise InvalidConfigError(f"shared dir {tag!r}: mount={mount!r}, expected an absolute path of the guest's other than /")
    return place


def checked_hidden(what: str, hidden: object) -> tuple[str, ...]:
    """Return patterns of paths that a guest is not to see; raises InvalidConfigError for what cannot be one."""
    if isinstance(hidden, str | bytes) or not isinstance(hidden, Iterable):
        raise InvalidConfigError(f"{what}: hidden={hidden!r}, expected a list of paths")
    patterns = []
    for each in hidden:
        pattern = os.fsdecode(each) if isinstance(each, str | os.PathLike) else ""
        if not pattern.startswith(("/", "~")) or "\0" in pattern or "\n" in pattern:
            raise InvalidConfigError(f"{what}: hidden has {each!r}, expected an absolute path, or one that begins with ~")
        patterns.append(pattern)
    return tuple(patterns)


@dataclass(frozen=True, slots=True)
class ServedShare:
    """A shared dir of a VM's, the virtiofsd that serves it, and the socket between the two."""

    share: SharedDir
    process: ProcessIdentity
    socket: Path

    @property
    def log(self) -> Path:
        """What its virtiofsd says."""
        return self.socket.with_suffix(".log")

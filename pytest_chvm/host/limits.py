"""How much memory and processor this process may have: the host's, or less where a control group (a container) says so."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def memory_limit() -> int:
    """Return the bytes of memory that the processes of this control group may have together."""
    import psutil

    return min([int(psutil.virtual_memory().total), *cgroup_memory_limits()])


def memory_available() -> int:
    """Return the bytes of memory that are free now, or can be made so without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def processors() -> int:
    """Return how many processors this process may keep busy, 1 or more."""
    return max(1, math.ceil(min([len(os.sched_getaffinity(0)), *cgroup_processor_limits()])))


def cgroup_memory_limits(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> list[int]:
    """Return the limits in bytes of this process's control groups and those above them, of both versions of cgroups(7)."""
    texts = [_read(group / "memory.max") for group in _groups("", cgroups, membership)]
    texts += [_read(group / "memory.limit_in_bytes") for group in _groups("memory", cgroups, membership)]
    # "max" means no limit; version 1 has a number larger than any memory for that.
    return [int(text) for text in texts if text.isdigit()]


def cgroup_processor_limits(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> list[float]:
    """Return the limits, in processors, likewise."""
    pairs = [_read(group / "cpu.max").split() for group in _groups("", cgroups, membership)]
    for group in _groups("cpu", cgroups, membership):
        pairs.append([_read(group / f"cpu.cfs_{what}_us") for what in ("quota", "period")])
    return [int(pair[0]) / int(pair[1]) for pair in pairs if len(pair) == 2 and all(text.isdigit() and int(text) for text in pair)]


def _groups(controller: str, cgroups: Path, membership: Path) -> Iterator[Path]:
    """Yield the directories of this process's group and of those above it; "" is version 2."""
    for line in _read(membership).splitlines():
        _number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            top = cgroups / controller if controller else cgroups
            group = top / path.strip("/")
            # In a container the path may be the host's while only a part of the tree is mounted: directories above are missing.
            yield from (place for place in (group, *group.parents) if place.is_relative_to(top))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

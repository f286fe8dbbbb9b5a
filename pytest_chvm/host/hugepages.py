"""Hugepages of the host's, which somebody has to have set aside."""

from __future__ import annotations

from pathlib import Path

from pytest_chvm.errors import InvalidConfigError, MissingRequirementError

MEMINFO = Path("/proc/meminfo")


def check_hugepages(memory_mb: int, numa_nodes: int, meminfo: Path = MEMINFO) -> None:
    """Raise InvalidConfigError for memory that is no whole number of hugepages, MissingRequirementError where too few are free.

    They are those of the host's default size: Documentation/admin-guide/mm/hugetlbpage.rst.
    """
    facts, size_kb = _facts(meminfo), hugepage_size_kb(meminfo)
    if not size_kb:
        raise MissingRequirementError("hugepages=True, and the kernel of this host has none (CONFIG_HUGETLBFS)")
    if (memory_mb << 10) % (size_kb * numa_nodes):
        raise InvalidConfigError(
            f"memory_mb={memory_mb} on hugepages, expected a multiple of {size_kb * numa_nodes / 1024:g}: a hugepage of this host "
            f"has {size_kb} KiB{f', and there are {numa_nodes} NUMA nodes' if numa_nodes > 1 else ''}"
        )
    needed, free = (memory_mb << 10) // size_kb, int(facts["HugePages_Free"]) - int(facts["HugePages_Rsvd"])
    if free < needed:
        raise MissingRequirementError(
            f"hugepages=True needs {needed} free hugepages of {size_kb} KiB, and {free} are free: set more aside with "
            f"'sysctl vm.nr_hugepages={int(facts['HugePages_Total']) + needed - free}'"
        )


def hugepage_size_kb(meminfo: Path = MEMINFO) -> int:
    """Return the default size of the host's hugepages in KiB, 0 where its kernel has none."""
    return int(_facts(meminfo).get("Hugepagesize", "0 kB").split()[0])


def _facts(meminfo: Path) -> dict[str, str]:
    return dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)

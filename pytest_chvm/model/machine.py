"""A machine's processors, and what else of it only some tests ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from pytest_chvm.errors import InvalidConfigError

# "wait": the guest stops at its first instruction, until a debugger lets it go on.
Gdb = bool | Literal["wait"]


@dataclass(frozen=True, slots=True)
class Cpus:
    """The processors of a VM: `sockets` times `cores` of each socket times `threads` of each core, in equal parts on `numa_nodes`.

    The memory is on the NUMA nodes in equal parts too. Raises InvalidConfigError for numbers that are none or do not divide.
    """

    sockets: int = 1
    cores: int = 1
    threads: int = 1
    numa_nodes: int = 1

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidConfigError(f"{self}: expected {each.name} to be a whole number of 1 or more")
        if self.count % self.numa_nodes:
            raise InvalidConfigError(f"{self}: expected as many NUMA nodes as its {self.count} processors can be divided by")

    @property
    def count(self) -> int:
        """How many processors they are."""
        return self.sockets * self.cores * self.threads

    def of_node(self, node: int) -> range:
        """Return the numbers of the processors on a NUMA node."""
        each = self.count // self.numa_nodes
        return range(node * each, (node + 1) * each)


def why_no_cpus(cpus: object, memory_mb: int, max_cpus: int | None) -> str | None:
    """Return why a VM cannot have these processors, or None where it can."""
    if not isinstance(cpus, Cpus):
        wrong = isinstance(cpus, bool) or not isinstance(cpus, int) or cpus < 1
        return f"cpus={cpus!r}, expected a whole number of 1 or more, or Cpus(...)" if wrong else None
    if max_cpus is not None:
        return "max_cpus, and cpus with a topology, which has no place for more: leave one of them out"
    if memory_mb % cpus.numa_nodes:
        return f"memory_mb={memory_mb}, expected one that {cpus.numa_nodes} NUMA nodes can have equal parts of"
    return None


def checked_vmm_args(given: Any) -> tuple[str, ...]:
    """Return the words of `vmm_args`; raises InvalidConfigError for what is no list of words."""
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise InvalidConfigError(f"vmm_args={given!r}, expected a list of words: ['-device', 'edu']")
    for word in given:
        if not isinstance(word, str) or "\0" in word:
            raise InvalidConfigError(f"vmm_args has {word!r}, expected a string without NUL")
    return tuple(given)

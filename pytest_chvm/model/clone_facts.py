"""What a test may want to be as after a boot also in a clone: the words of `clone_must_have`."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Literal, get_args

from pytest_chvm.errors import InvalidConfigError

# What each of them is in a clone: docs/how-it-works.md, and `pytest_chvm.clones.truth` where it is not as after a boot.
CloneFact = Literal[
    "boot_id",
    "btf",
    "clocksource",
    "cmdline",
    "devices",
    "dmesg",
    "dmi_uuid",
    "entropy",
    "interrupts",
    "kaslr",
    "mac",
    "modules",
    "perf",
    "rcu",
    "secrets",
    "taint",
    "timers",
    "tsc",
    "uptime",
]
CLONE_FACTS: tuple[CloneFact, ...] = get_args(CloneFact)


def checked_facts(given: object) -> tuple[CloneFact, ...]:
    """Return the words of `clone_must_have`; raises InvalidConfigError for one that is none, with the near ones."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise InvalidConfigError(f"clone_must_have={given!r}, expected a list of words, of {', '.join(CLONE_FACTS)}")
    for word in given:
        if word not in CLONE_FACTS:
            near = get_close_matches(str(word), CLONE_FACTS, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are: {', '.join(CLONE_FACTS)}"
            raise InvalidConfigError(f"clone_must_have has {word!r}, which is nothing that a clone is asked for; {hint}")
    return tuple(given)

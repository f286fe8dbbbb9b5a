"""What a guest's kernel has said: its log's messages, and the splats among them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KernelMessage:
    """A message of a kernel's log.

    `time_s` is seconds since the kernel's start (None where it prints no times), `level` 0 (emergency) to 7 (debug), `facility` 0
    for the kernel's own and another for what a program wrote to /dev/kmsg (syslog(3)); both are None where only the console has
    said it.
    """

    time_s: float | None
    level: int | None
    facility: int | None
    text: str


@dataclass(frozen=True, slots=True)
class Splat:
    """A report of a kernel's that something is wrong with it, from its first line to its last.

    `kind` is "BUG", "WARNING", "Oops", "KASAN" (also of KFENCE and KMSAN), "KCSAN", "UBSAN", "lockdep", "RCU stall", "hung task",
    "soft lockup", "hard lockup", "refcount", "page allocation failure", "memory leak" or "panic"; `title` its line that says what
    is wrong, `text` all its lines. `taint` is what the kernel says of itself (Documentation/admin-guide/tainted-kernels), `modules`
    are those that were loaded; both as far as the splat says. `commands` are those of the test's that ran when it came; `in_boot`:
    it came before the guest was ready.
    """

    kind: str
    title: str
    time_s: float | None
    text: str
    taint: str | None = None
    modules: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    in_boot: bool = False

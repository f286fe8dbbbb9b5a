"""Finds splats in a kernel's log: reports of the kernel's that something is wrong with it. Everything here only reads text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from pytest_chvm.model.kernel_log import KernelMessage, Splat

PANIC, OOPS = "panic", "Oops"
LONGEST_SPLAT = 400
MOST_SPLATS = 50
MOST_MODULES = 500
# A message so much later than the one before is no part of what that one belongs to.
GAP_S = 2.0
CUT_HERE = "------------[ cut here ]------------"
# The first lines of splats, by their kind; the first that matches counts. Of Linux 4.x to 6.x, lib/ and kernel/ mostly.
KINDS = {
    "KASAN": r"BUG: (?:KASAN|KFENCE|KMSAN): ",
    "KCSAN": r"BUG: KCSAN: ",
    "UBSAN": r"UBSAN: ",
    "lockdep": (
        r"(?:WARNING|(?:\[ )?INFO|(?:\[ )?BUG): (?:possible (?!memory)|suspicious RCU|inconsistent lock|bad unlock|held lock freed|"
        r"lock held|[Nn]ested lock|chain key|(?:HARD|SOFT|hard|soft)(?:IRQ|irq)-|locking bug|[Ii]nvalid wait|trying to register|"
        r"lockdep|MAX_LOCK|MAX_STACK_TRACE|bad contention|(?:\S+ )?still has locks)|DEBUG_LOCKS_WARN_ON"
    ),
    "RCU stall": r"(?:rcu: )?INFO: (?:rcu\w* (?:\w+ )?(?:self-)?detected |\S+ (?:self-)?detected (?:expedited )?stall)",
    "hung task": r"INFO: task .{1,80} (?:blocked|can't die) (?:.{1,40} )?for more than \d+ seconds",
    "soft lockup": r"(?:NMI )?(?:watchdog: )?BUG: (?:soft lockup|workqueue lockup)",
    "hard lockup": r"(?:NMI )?[Ww]atchdog(?:: (?:CPU\d+: )?(?:Watchdog)?)? ?detected hard LOCKUP",
    "refcount": r"refcount_t(?::| )",
    "page allocation failure": r".{1,80}: (?:page allocation (?:failure|stalls)|vmalloc (?:error|size|allocation))",
    "memory leak": r"kmemleak: \d+ new suspected memory leak",
    "WARNING": (
        r"WARNING: (?:CPU: ?\d+ PID: ?\d+ at |\S+:\d+ at |at |\[.{1,200}\] \S+:\d+ at |kernel stack|stack |can't dereference|"
        r"unrecognized)"
    ),
    "BUG": r"BUG: |BUG \S.{0,40} \((?:Tainted|Not tainted)|kernel BUG at |kernel BUG, |BUG at ",
    OOPS: (
        r"(?:Internal error: )?Oops(?:: | - |\[)|Unable to handle kernel|Internal error: |(?:segment-related )?general protection "
        r"fault|divide[_ ]error: |invalid opcode: |(?:PANIC: )?double fault|stack segment: |unable to handle page fault|"
        r"int3: |Unhandled fault:"
    ),
    PANIC: r"Kernel panic - not syncing: ",
}
HEADER = re.compile("|".join(f"({pattern})" for pattern in KINDS.values()))
# On a serial console, where times stand before messages; found fast in much other text.
TITLE_ON_CONSOLE = re.compile((r"\[ *(\d{1,12}\.\d{1,9})\](?:\[ *[TC]\d+\])? {1,3}(?:" + "|".join(KINDS.values()) + ")").encode())
# Which of the kinds go on with what another one has begun.
INNER = (OOPS, PANIC)
# What each oops has, with its number: "Oops: 0002 [#1] PREEMPT SMP", "invalid opcode: 0000 [#1]" of a BUG() and "general protection
# fault, ...: 0000 [#1]" of x86 (arch/x86/kernel/dumpstack.c), "Internal error: Oops - BUG: 00000000f2000800 [#1]" of arm64.
OOPS_LINE = re.compile(r"^ {0,3}(?=[A-Za-z])[^\n]{1,200}: [0-9a-f]{4,16} \[#\d{1,6}\]", re.M)
RULE = re.compile(r"={20,}|#{20,}")
END = re.compile(r"---\[ end (?:trace|Kernel panic)")
TRACE = re.compile(r"Call [Tt]race:|Backtrace:|stack backtrace:")
TRACE_END = " </TASK>"
# What may still follow the trace.
TRAILER = re.compile(
    r"\s|Modules linked in|Call [Tt]race|CR2: |---\[|RIP|RSP|EIP|Code: |[CEFDRGS][0-9A-Z]{1,2}: ?\S|PKRU|Kernel (?:panic|Offset)|"
    r"Mem-Info|active_|Node |DMA|Normal|lowmem_|\d+ |Rebooting|irq event|(?:hard|soft)irqs|NMI backtrace|Sending NMI|Showing |"
    r"Memory |Freed by|Allocated by|Last potentially|The buggy|page:|raw: |page dumped|<|>|=|CPU: |Hardware name|note: |"
    r"(?:pc|lr|sp|x\d+) :"
)
TAINT = re.compile(r"Not tainted|Tainted: [A-Z](?: *[A-Z])*\b")
MODULES = re.compile(r"Modules linked in:(.*)")
MODULE = re.compile(r"([A-Za-z0-9_]{1,64})(?:\([A-Z+-]{1,10}\))?")


@dataclass
class _Open:
    """A splat whose end has not come."""

    lines: list[str] = field(default_factory=list)
    kind: str | None = None
    title: str = ""
    time_s: float | None = None
    start: int = 0
    ruled: bool = False
    trace_over: bool = False
    latest_s: float | None = None


def find_splats(messages: Iterable[KernelMessage]) -> list[Splat]:
    """Return the splats in a kernel's log, the first 50; one of more than 400 lines is cut there."""
    return [splat for _start, splat in located_splats(enumerate(messages))]


def located_splats(messages: Iterable[tuple[int, KernelMessage]]) -> list[tuple[int, Splat]]:
    """Return the splats, each with what stands at its title's message in place of a number."""
    found: list[tuple[int, Splat]] = []
    current: _Open | None = None

    def close() -> None:
        if current is not None and current.kind is not None and len(found) < MOST_SPLATS:
            found.append((current.start, _splat(current)))

    for place, message in messages:
        if current is not None and _is_apart(current, message):
            close()
            current = None
        text = message.text
        kind = kind_of(text)
        if _begins(current, kind, text):
            close()
            current = _Open(ruled=RULE.match(text.lstrip()) is not None)
        if current is None:
            continue
        current.lines.append(text)
        current.latest_s = message.time_s
        if kind is not None and (current.kind is None or (current.kind, kind) == ("refcount", "WARNING")):
            current.start = place if current.kind is None else current.start
            current.kind, current.title, current.time_s = current.kind or kind, current.title or text.strip(), message.time_s
        current.trace_over = (current.trace_over or text == TRACE_END) and TRACE.match(text) is None
        if _ends(current, text):
            close()
            current = None
    close()
    return found


def has_oops(text: str) -> bool:
    """Tell whether a splat's text has an oops in it, as x86 and arm64 print them."""
    return OOPS_LINE.search(text) is not None


def kind_of(text: str) -> str | None:
    """Return the kind of splat whose title a message is; None for another message."""
    match = HEADER.match(text.lstrip())
    return None if match is None else tuple(KINDS)[(match.lastindex or 1) - 1]


def _begins(current: _Open | None, kind: str | None, text: str) -> bool:
    """Tell whether a message is the first of a splat, or of what may become one."""
    if text.startswith(CUT_HERE):
        return True
    if RULE.match(text.lstrip()):
        return current is None or (current.kind is None and not current.ruled)
    if kind is None:
        return False
    if current is None:
        return True
    return current.kind is not None and kind not in INNER and (current.kind, kind) != ("refcount", "WARNING")


def _is_apart(current: _Open, message: KernelMessage) -> bool:
    """Tell whether a message is no part of the splat before it."""
    if current.latest_s is not None and message.time_s is not None and message.time_s - current.latest_s > GAP_S:
        return True
    if current.kind is None:
        # A rule or "cut here" has a title within a few lines.
        return len(current.lines) > 4
    if current.trace_over and kind_of(message.text) not in (None, *INNER):
        return True
    return current.trace_over and not TRAILER.match(message.text) and kind_of(message.text) is None


def _ends(current: _Open, text: str) -> bool:
    """Tell whether this message of a splat is its last."""
    if END.match(text) or len(current.lines) >= LONGEST_SPLAT:
        return True
    return current.kind is not None and current.ruled and RULE.match(text.lstrip()) is not None


def _splat(current: _Open) -> Splat:
    assert current.kind is not None
    text = "\n".join(current.lines)
    taint, modules = TAINT.search(text), MODULES.search(text)
    names = module_names(modules[1].split() if modules else ())
    said = None if taint is None else " ".join(taint[0].split())
    return Splat(current.kind, current.title, current.time_s, text, said, names)


def module_names(words: Iterable[str]) -> tuple[str, ...]:
    """Return the names of modules among words that a guest has said, without their flags, the first 500."""
    return tuple(found[1] for word in islice(words, MOST_MODULES) if (found := MODULE.fullmatch(word)))

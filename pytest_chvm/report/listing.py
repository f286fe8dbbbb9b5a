"""Tables for a terminal, and the last line of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text, each column as wide as its longest cell, the last one as it is."""
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
    widths[-1] = 0
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows))
    return "".join(f"{line.rstrip()}\n" for line in lines)


def duration(seconds: float | None) -> str:
    """Return an age as a person says it: `9s`, `4m05s`, `2h03m`."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def run_summary(started: Mapping[str, int], left: Sequence[str]) -> list[str]:
    """Return what a run says at its end of all its VMs: what was started, and that it is gone or what is not."""
    counts = ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in started.items() if count)
    if not left:
        return [f"chvm: {counts or 'nothing'} started; all gone"]
    return [
        f"chvm: {counts or 'nothing'} started; LEFT BEHIND: {left[0]}",
        *(f"chvm: left behind: {what}" for what in left[1:]),
        "chvm: 'chvm ps' shows what still runs, 'chvm reap' removes what nobody owns any more",
    ]

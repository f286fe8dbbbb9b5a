"""A VM's events as a person reads them. What a guest or a test wrote in them is cleaned and bounded."""

from __future__ import annotations

from collections.abc import Sequence

from pytest_chvm.base.text import clean_text
from pytest_chvm.machine.events import COMMAND, SPAWNED, Event, last_of, ready_after_s

LONGEST_LINE = 200


def how_it_started(events: Sequence[Event]) -> list[str]:
    """Return how a VM came to be and how soon it was ready, as phrases: `["a clone", "ready after 0.4 s"]`."""
    spawned, seconds = last_of(events, SPAWNED), ready_after_s(events)
    phrases = [_plain(str(spawned.details.get("origin", "")))] if spawned else []
    return [*filter(None, phrases), *([] if seconds is None else [f"ready after {seconds:.1f} s"])]


def last_events(events: Sequence[Event], count: int) -> str:
    """Return the last events, a line each, with the seconds since the first one (the start of the VMM)."""
    lines = [f"{event.at_s - events[0].at_s:7.1f} s  {in_words(event)}" for event in events[-count:]]
    left_out = len(events) - len(lines)
    return "\n".join([*([f"({left_out} before these)"] if left_out else []), *lines])


def in_words(event: Event) -> str:
    """Return what happened, in one line."""
    details = event.details
    if event.kind == SPAWNED:
        said = f"{details.get('vmm')}, pid {details.get('pid')}"
    elif event.kind == COMMAND:
        how = details.get("error") or f"returned {details.get('returncode')}"
        # The end of a long command says less than how it ended.
        said = f"{how} after {details.get('duration_s')} s: {details.get('command')}"
    else:
        said = ", ".join(f"{key} {value}" if key not in ("text", "how") else f"{value}" for key, value in details.items())
    line = _plain(f"{event.kind}: {said}" if said else event.kind)
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."


def _plain(text: str) -> str:
    return clean_text(text).replace("\n", " ").replace("\t", " ")

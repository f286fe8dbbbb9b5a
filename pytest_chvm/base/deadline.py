"""Deadlines on a clock that stands still while this process is stopped.

Ctrl-Z and fg, a paused or migrated virtual machine, a frozen container: the monotonic clock goes on meanwhile, and what is waited
for has had no chance to happen. So a wait that wakes much later than it asked to sets the clock back by what it overslept.
"""

from __future__ import annotations

import math
import select
from collections.abc import Iterable
from dataclasses import dataclass

from pytest_chvm.base.untouched import monotonic_s
from pytest_chvm.errors import InvalidConfigError

# The longest wait at once, and so the longest time that a stop may take of a deadline.
LONGEST_WAIT_S = 0.5
# A shorter delay is a busy machine's, and counts.
SHORTEST_STOP_S = 2.0


class _Clock:
    """The monotonic clock, without the time in which this process stood still."""

    def __init__(self) -> None:
        self._stopped_s = 0.0
        self._seen_s = 0.0

    def now_s(self) -> float:
        return monotonic_s() - self._stopped_s

    def woke(self, due_s: float) -> None:
        """Take note that a wait has ended which was to end by `due_s` of the monotonic clock."""
        # Of several threads that were stopped, the first to wake counts the stop. No lock: a forked child would inherit it.
        seen_s, self._seen_s = self._seen_s, monotonic_s()
        overslept_s = self._seen_s - max(due_s, seen_s)
        if overslept_s > SHORTEST_STOP_S:
            self._stopped_s += overslept_s


_clock = _Clock()


@dataclass(frozen=True, slots=True)
class Deadline:
    """`Deadline.after(5)` is five seconds from now; `total_s` is kept for messages."""

    at_s: float
    total_s: float

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """Return the deadline that many seconds from now; with None or infinity it never comes."""
        seconds = math.inf if seconds is None else seconds
        return cls(_clock.now_s() + seconds, seconds)

    @property
    def remaining_s(self) -> float:
        """Seconds left, never below zero; infinity for one that never comes."""
        return max(0.0, self.at_s - _clock.now_s())

    @property
    def wait_s(self) -> float:
        """Seconds that may be waited at once, however far off the deadline is."""
        return min(self.remaining_s, LONGEST_WAIT_S)

    @property
    def wait_ms(self) -> int:
        """As `wait_s`, for poll(2). Rounded up: a poll of 0 ms with time left would spin."""
        return int(self.wait_s * 1000) + 1

    @property
    def expired(self) -> bool:
        """Whether the moment has passed."""
        return _clock.now_s() >= self.at_s


def checked_timeout(seconds: float | None) -> float:
    """Return a timeout as seconds, infinity for None; raises InvalidConfigError for anything but a number of 0 or more."""
    if seconds is None:
        return math.inf
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or math.isnan(seconds) or seconds < 0:
        raise InvalidConfigError(f"timeout={seconds!r}: expected seconds, 0 or more, or None for no limit")
    return float(seconds)


def wait_readable(fds: Iterable[int], deadline: Deadline) -> set[int]:
    """Block until one of the descriptors is readable, hung up or in error; returns those, or none at the deadline."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _events in poll_until(poll, deadline)}


def poll_until(poll: select.poll, deadline: Deadline) -> list[tuple[int, int]]:
    """Block until a poll object reports events or the deadline passes; returns the result of its `poll()`."""
    while True:
        due_s = monotonic_s() + deadline.wait_s
        ready = poll.poll(deadline.wait_ms)
        _clock.woke(due_s)
        if ready or deadline.expired:
            return ready

"""A moment on the monotonic clock by which something must have happened."""

from __future__ import annotations

import select
import time
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """`Deadline.after(5)` is five seconds from now; `total_s` is kept for messages."""

    at_s: float
    total_s: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Return the deadline that many seconds from now."""
        return cls(time.monotonic() + seconds, seconds)

    @property
    def remaining_s(self) -> float:
        """Seconds left, never below zero."""
        return max(0.0, self.at_s - time.monotonic())

    @property
    def expired(self) -> bool:
        """Whether the moment has passed."""
        return time.monotonic() >= self.at_s


def wait_readable(fds: Iterable[int], deadline: Deadline) -> set[int]:
    """Block until one of the descriptors is readable, hung up or in error; returns those, or none at the deadline."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    # Rounded up: a poll of 0 ms with time left would spin.
    return {fd for fd, _events in poll.poll(int(deadline.remaining_s * 1000) + 1)}

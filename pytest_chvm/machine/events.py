"""What has happened to one VM, with times: kept in memory, and as JSON lines in a file beside its logs.

`chvm ps` and the report of a failed test are drawn from it. A line is appended by one write, so that the file is whole however this
process ends. All text in a line is ASCII: what a guest or a test wrote cannot reach a terminal from there.
"""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pytest_chvm.base.untouched import monotonic_s, wall_clock_s
from pytest_chvm.drivers.base import logger

# The kinds of events, and what their details have.
SPAWNED = "spawned"  # vmm, pid, start_time_ticks, command, console (the serial log's path), origin
VIRTIOFSD = "virtiofsd started"  # pid, tag, host_path
PLUGGED = "plugged"  # id, device ("disk", "nic", "fs")
UNPLUGGED = "unplugged"  # id, device
READY = "ready"  # ip
COMMAND = "command"  # command, returncode (None: it did not end), duration_s
PUT = "put"  # source, destination, duration_s
GET = "get"  # source, destination, duration_s
SNAPSHOT = "snapshot"  # directory
CLONE = "clone"  # name of the clone
PAUSED = "paused"
RESUMED = "resumed"
REBOOT = "reboot"  # asked_for
PANIC = "panic"  # text
OOPS = "oops"  # text
ENDED = "ended"  # how

# Of a text, how many characters are kept.
LONGEST_TEXT = 2000
# Commands are no longer written to a file of this size, and nothing is to one twice as large.
LARGEST_FILE = 4 << 20
# Of more events than this the first ones and the latest are kept in memory.
MOST_EVENTS, FIRST_EVENTS = 10_000, 100


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a VM.

    `at_s` is seconds of the host's monotonic clock, `wall_s` seconds since the epoch; `kind` is one of the constants above, and
    `details` what they say of it, as JSON has it.
    """

    at_s: float
    wall_s: float
    kind: str
    details: Mapping[str, object] = field(default_factory=dict)

    def to_line(self) -> bytes:
        """Return the event as a line of JSON."""
        line = json.dumps({"at_s": self.at_s, "wall_s": self.wall_s, "kind": self.kind, "details": dict(self.details)})
        return line.encode() + b"\n"


class EventLog:
    """The events of one VM, to which any thread adds; `close` lets go of the file."""

    def __init__(self, path: Path) -> None:
        self._events: list[Event] = []
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._size = 0
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(path, flags, 0o600)
        except OSError as error:
            logger.warning("the events of a VM are not written down: %s", error)

    @property
    def events(self) -> tuple[Event, ...]:
        """The events so far, in order; of very many only the first ones and the latest."""
        with self._lock:
            return tuple(self._events)

    def add(self, kind: str, *, at_s: float | None = None, **details: object) -> None:
        """Add an event that happens now, or happened at `at_s` (seconds of the monotonic clock). Never raises for a file."""
        now_s, wall_s = monotonic_s(), wall_clock_s()
        at_s = now_s if at_s is None else at_s
        event = Event(at_s, wall_s - (now_s - at_s), kind, {key: _bounded(value) for key, value in details.items()})
        line = event.to_line()
        with self._lock:
            self._events.append(event)
            if len(self._events) > MOST_EVENTS:
                del self._events[FIRST_EVENTS : MOST_EVENTS // 2]
            if self._fd is None or self._size + len(line) > (LARGEST_FILE if kind == COMMAND else 2 * LARGEST_FILE):
                return
            try:
                self._size += os.write(self._fd, line)
            except OSError:
                # A full disk, most likely: what happens next is in memory.
                os.close(self._fd)
                self._fd = None

    def close(self) -> None:
        """Let go of the file; what is added afterwards is in memory only."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None


def _bounded(value: object) -> object:
    if not isinstance(value, str) or len(value) <= LONGEST_TEXT:
        return value
    return f"{value[:LONGEST_TEXT]}... ({len(value)} characters)"


def read_events(path: Path) -> tuple[Event, ...]:
    """Return the events that are in a file, which anybody may have written; lines that are none are left out.

    Raises OSError where there is no such file, or it is none.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(f"{str(path)!r} is no file")
        raw = file.read(2 * LARGEST_FILE)
    return tuple(event for line in raw.split(b"\n") if (event := _event_of(line)) is not None)


def _event_of(line: bytes) -> Event | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    at_s, wall_s, kind, details = (fields.get(key) for key in ("at_s", "wall_s", "kind", "details"))
    if type(at_s) is not float or type(wall_s) is not float or not isinstance(kind, str) or not isinstance(details, dict):
        return None
    return Event(at_s, wall_s, kind, details)


def last_of(events: Iterable[Event], *kinds: str) -> Event | None:
    """Return the last event of one of the kinds; None where there is none."""
    found = None
    for event in events:
        if event.kind in kinds:
            found = event
    return found


def ready_after_s(events: Iterable[Event]) -> float | None:
    """Return how many seconds after its VMM's start a VM was ready for the first time; None where it was not."""
    spawned_s = None
    for event in events:
        if event.kind == SPAWNED:
            spawned_s = event.at_s
        elif event.kind == READY and spawned_s is not None:
            return event.at_s - spawned_s
    return None

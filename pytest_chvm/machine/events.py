"""What has happened to one VM, with times: kept in memory, and as JSON lines in a file beside its logs.

`chvm ps` and the report of a failed test are drawn from it. A line is appended by one write, so that all lines but the last are
whole however this process ends. All text in a line is ASCII: what a guest or a test wrote cannot reach a terminal from there.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pytest_chvm.base.untouched import monotonic_s, wall_clock_s
from pytest_chvm.drivers.base import logger
from pytest_chvm.errors import GuestPanicError, GuestRebootError, GuestShutdownError, VmError
from pytest_chvm.model import VmHandle

# The kinds of events, and what their details have.
SPAWNED = "spawned"  # vmm, pid, start_time_ticks, command, console (the serial log's path), origin (in words)
VIRTIOFSD = "virtiofsd started"  # pid, tag, host_path
PLUGGED = "plugged"  # id, device ("disk", "nic", "fs")
UNPLUGGED = "unplugged"  # id, device
READY = "ready"  # ip
# Of these, `error` is the name of the exception where one was raised.
COMMAND = "command"  # command, returncode, duration_s, error
POPEN = "popen"  # command, duration_s (of its start), error
PUT = "put"  # source, destination, duration_s, error
GET = "get"  # source, destination, duration_s, error
WAIT = "wait"  # what for, duration_s, error
PROCESS_ENDED = "process ended"  # command, returncode, duration_s; of a popen's, when the test has heard of it
SNAPSHOT = "snapshot"  # duration_s, error
CLONE = "clone"  # name of the clone
PAUSED = "paused"
RESUMED = "resumed"
REBOOT = "reboot"  # text, where nobody asked for it
PANIC = "panic"  # text
SPLAT = "splat"  # text, commands; when a test is told of it
TROUBLE = "trouble"  # text; a virtiofsd that ended, for instance
ENDED = "ended"  # how

# Longer texts are cut to so many characters.
LONGEST_TEXT = 2000
# The kinds of which a test may have very many.
FREQUENT = (COMMAND, POPEN, PUT, GET, WAIT, PROCESS_ENDED)
# Those are no longer written to a file of this size, and nothing is to one twice as large.
LARGEST_FILE = 4 << 20
# In memory: beyond this many, the first ones and the latest are kept.
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
        fields = {"at_s": self.at_s, "wall_s": self.wall_s, "kind": self.kind, "details": dict(self.details)}
        # A test may pass anything; the error for a wrong type is raised elsewhere.
        line = json.dumps(fields, default=repr)
        return line.encode() + b"\n"


class EventLog:
    """The events of one VM, to which any thread adds; `close` lets go of the file."""

    def __init__(self, path: Path) -> None:
        self._events: list[Event] = []
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._size = 0
        self._told: set[str] = set()
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
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
        self._add(kind, details, at_s)

    def _add(self, kind: str, details: Mapping[str, object], at_s: float | None = None) -> None:
        now_s, wall_s = monotonic_s(), wall_clock_s()
        at_s = now_s if at_s is None else at_s
        event = Event(at_s, wall_s - (now_s - at_s), kind, {key: _bounded(value) for key, value in details.items()})
        line = event.to_line()
        with self._lock:
            self._events.append(event)
            if len(self._events) > MOST_EVENTS:
                del self._events[FIRST_EVENTS : MOST_EVENTS // 2]
            if self._fd is None or self._size + len(line) > (LARGEST_FILE if kind in FREQUENT else 2 * LARGEST_FILE):
                return
            try:
                written = os.write(self._fd, line)
            except OSError:
                written = 0
            self._size += written
            if written < len(line):
                # Most likely a full disk. Later events are kept in memory only: after half a line the next one would be malformed.
                os.close(self._fd)
                self._fd = None

    @contextmanager
    def timed(self, kind: str, **details: object) -> Iterator[dict[str, object]]:
        """Add an event at the end of the block, with how long that took; what is put in the dict is added to its details."""
        started_s, outcome = monotonic_s(), dict(details)
        try:
            yield outcome
        except BaseException as error:
            outcome["error"] = type(error).__name__
            raise
        finally:
            self._add(kind, {**outcome, "duration_s": round(monotonic_s() - started_s, 3)})

    def add_spawned(self, handle: VmHandle, origin: str, tags: Iterable[str]) -> None:
        """Add the start of a VMM and of the virtiofsd of each of its shared dirs, whose tags these are."""
        process = handle.process
        assert process is not None
        self.add(
            SPAWNED,
            at_s=_started_at_s(process.start_time_ticks),
            vmm=handle.vmm,
            pid=process.pid,
            start_time_ticks=process.start_time_ticks,
            command=shlex.join(handle.command),
            console=os.fspath(handle.serial_log),
            origin=origin,
        )
        for tag, sidecar in zip(tags, handle.sidecars, strict=True):
            self.add(VIRTIOFSD, at_s=_started_at_s(sidecar.start_time_ticks), pid=sidecar.pid, tag=tag)

    def add_ready(self, ip: str) -> None:
        """Add that the guest is ready, once for each time that it has started."""
        last = last_of(self.events, READY, SPAWNED, REBOOT, PANIC)
        if last is None or last.kind != READY:
            self._told.clear()
            self.add(READY, ip=ip)

    def add_trouble(self, error: VmError, *, vmm_ended: bool) -> None:
        """Add an error of the guest or its VMM, once for each start of the guest."""
        # Without the log lines that follow it in the message.
        text = str(error).partition("\n")[0].partition(". Its ")[0].removeprefix(f"VM {error.vm_name!r}: ")
        kinds = ((PANIC, GuestPanicError), (REBOOT, GuestRebootError), (ENDED, GuestShutdownError))
        kind = next((kind for kind, errors in kinds if isinstance(error, errors)), ENDED if vmm_ended else TROUBLE)
        # The words for a panic change once its text is on the console.
        what = text if kind == TROUBLE else kind
        if what in self._told:
            return
        self._told.add(what)
        if kind == ENDED:
            self.add_ended(text)
        else:
            self.add(kind, text=text)

    def add_ended(self, how: str) -> None:
        """Add the end of the VM; only the first call counts."""
        if last_of(self.events, ENDED) is None:
            self.add(ENDED, how=how)

    def close(self) -> None:
        """Let go of the file; what is added afterwards is in memory only."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None


def _started_at_s(start_time_ticks: int | None) -> float | None:
    """Return when a process started, by the monotonic clock; the kernel records it by the clock that includes suspends."""
    if start_time_ticks is None:
        return None
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - start_time_ticks / os.sysconf("SC_CLK_TCK")
    return monotonic_s() - max(0.0, age_s)


def _bounded(value: object) -> object:
    if not isinstance(value, str) or len(value) <= LONGEST_TEXT:
        return value
    return f"{value[:LONGEST_TEXT]}... ({len(value)} characters)"


def read_events(path: Path) -> tuple[Event, ...]:
    """Return the events in a file, which anybody may have written; malformed lines are skipped.

    Raises OSError where there is no such file, or it is no regular one.
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
    if type(at_s) is not float or type(wall_s) is not float or not math.isfinite(at_s) or not math.isfinite(wall_s):
        return None
    if not isinstance(kind, str) or not isinstance(details, dict):
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

"""Watches a VM for splats: its console as it grows, and the log of its kernel where the console may not have all of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING

from pytest_chvm.base.text import read_tail
from pytest_chvm.guest.ready import LogReader

# What reads a kernel's log is imported where there is one to read: each process that starts a VM would wait for it.
if TYPE_CHECKING:
    from pytest_chvm.model.kernel_log import Splat

LONGEST_TITLE = 400
# What stands before each message, splats' titles too; a clone's console has none until its kernel says something.
STAMP = re.compile(rb"\[ *\d{1,12}\.\d{1,9}\]")
# Of a console with a splat so much is read again: from a little before its title, where "cut here" stands, on.
BEFORE, LONGEST_READ = 4096, 8 << 20
MOST_PLACES = 1000
LONGEST_PANIC = 1 << 20
PANIC_TEXT = "Kernel panic - not syncing: "
JUST_BEFORE_S = 2.0
# Times of the console and the log are of the same clock, in microseconds.
SAME_TIME_S = 1e-5


@dataclass
class SplatWatch:
    """The watch over one VM's splats; any thread may use it.

    `start`: how much of the console's log is of a VM that was saved, `since_s`: the kernel's time when that was, -1 for a VM of its
    own. `ask` returns what `dmesg -r` prints in the guest, None where it does not answer. `asks`: the console may lack splats.
    """

    log: Path
    start: int
    since_s: float
    ask: Callable[[], bytes | None]
    asks: Callable[[], bool]
    _running: dict[object, str] = field(default_factory=dict)
    _places: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    _seen: int = field(init=False)
    # How much of the console is of the boot: all of it, as long as the guest is not ready.
    _booted_at: float = math.inf
    _found: list[Splat] = field(default_factory=list)
    _known: set[tuple[float | None, str]] = field(default_factory=set)
    _lock: RLock = field(default_factory=RLock)

    def __post_init__(self) -> None:
        self._reader = LogReader(self.log, LONGEST_TITLE, self.start, self.start)
        self._seen = self.start

    @contextmanager
    def during(self, command: str) -> Iterator[None]:
        """Take note that splats which come in the block come while the command runs."""
        key = self.begin(command)
        try:
            yield
        finally:
            self.end(key)

    def begin(self, command: str) -> object:
        """Take note that a command runs, until `end` is called with what this returns."""
        key = object()
        with self._lock:
            # What has come before it is none of this command's.
            self.look()
            self._running[key] = command
        return key

    def end(self, key: object) -> None:
        """Take note that a command has ended."""
        with self._lock:
            if key in self._running:
                self.look()
                del self._running[key]

    def note_ready(self) -> None:
        """Take note that the guest is ready: what comes from now on is none of its boot's."""
        with suppress(OSError):
            self._booted_at = self.log.stat().st_size

    def look(self) -> None:
        """Take note of what is new on the console, and of what runs now."""
        with self._lock:
            for piece in self._reader.pieces():
                begin = self._reader.offset - len(piece)
                if begin + len(piece) < self._seen:
                    # The log was truncated when the guest rebooted.
                    self._seen = 0
                if not STAMP.search(piece):
                    continue
                from pytest_chvm.guest.splats import TITLE_ON_CONSOLE

                for match in TITLE_ON_CONSOLE.finditer(piece):
                    place = begin + match.start(1)
                    if place >= self._seen and len(self._places) < MOST_PLACES:
                        self._places.append((place, tuple(self._running.values())))
                        self._seen = begin + match.end()

    def collect(self, *, trusts_console: bool = False) -> None:
        """Find the splats that are new. With `trusts_console` the guest is not asked, and what the console says counts."""
        with self._lock:
            self.look()
            places, self._places = self._places, []
            if not places and (trusts_console or not self.asks()):
                return
            from pytest_chvm.guest.splats import PANIC

            found = self._on_console(places)
            said = None if trusts_console else self.ask()
            if said is not None:
                found = self._checked(found, said)
            for splat in found:
                # A panic ends the guest: that is an error of its own.
                if splat.kind != PANIC and (key := (splat.time_s, splat.title)) not in self._known:
                    self._known.add(key)
                    self._found.append(splat)

    def _on_console(self, places: list[tuple[int, tuple[str, ...]]]) -> list[Splat]:
        if not places:
            return []
        from pytest_chvm.guest.kernel_log import located_messages
        from pytest_chvm.guest.splats import located_splats

        begin = max(self.start, places[0][0] - BEFORE)
        try:
            with self.log.open("rb") as file:
                file.seek(begin)
                raw = file.read(LONGEST_READ)
        except OSError:
            return []
        ran = dict(places)
        located = located_splats(located_messages(raw))
        return [
            replace(splat, commands=ran[begin + place], in_boot=begin + place < self._booted_at)
            for place, splat in located
            if begin + place in ran
        ]

    def _checked(self, found: list[Splat], said: bytes) -> list[Splat]:
        """Return the splats as the kernel's log has them, without what only looks like one on the console."""
        from pytest_chvm.guest.kernel_log import parse_dmesg
        from pytest_chvm.guest.splats import find_splats

        messages = [message for message in parse_dmesg(said) if message.time_s is None or message.time_s > self.since_s]
        logged = find_splats(messages)
        oldest_s = next((message.time_s for message in messages if message.time_s is not None), None)
        checked = []
        for splat in found:
            same = next((other for other in logged if _is_same(splat, other)), None)
            if same is not None:
                checked.append(replace(same, commands=splat.commands, in_boot=splat.in_boot))
            elif oldest_s is None or splat.time_s is None or splat.time_s < oldest_s:
                # The log has forgotten it.
                checked.append(splat)
        if self.asks():
            checked += [splat for splat in logged if not any(_is_same(splat, other) for other in checked)]
        return checked

    @property
    def untaken(self) -> list[Splat]:
        """The splats that nobody has taken yet."""
        return list(self._found)

    def take(self, wanted: Callable[[Splat], bool] = lambda _splat: True) -> list[Splat]:
        """Return the splats that nobody has taken yet, those that are wanted; the others stay."""
        with self._lock:
            taken = [splat for splat in self._found if wanted(splat)]
            self._found = [splat for splat in self._found if splat not in taken]
        return taken

    def start_anew(self) -> None:
        """Take note that the guest starts again: its kernel's log is a new one."""
        with self._lock:
            self.collect(trusts_console=True)
            self._known.clear()
            self._booted_at = math.inf
            self.since_s = -1.0
            self._reader.forget()
            self._seen = self._reader.offset


def _is_same(one: Splat, other: Splat) -> bool:
    if one.title != other.title:
        return False
    return one.time_s is None or other.time_s is None or abs(one.time_s - other.time_s) < SAME_TIME_S


def panic_on_console(log: Path) -> str | None:
    """Return a kernel's panic as a serial log has it, with what it reported just before; None where none is there."""
    from pytest_chvm.guest.kernel_log import parse_console
    from pytest_chvm.guest.splats import find_splats

    try:
        splats = find_splats(parse_console(read_tail(log, LONGEST_PANIC)))
    except OSError:
        return None
    last = next((number for number in reversed(range(len(splats))) if PANIC_TEXT in splats[number].text), None)
    if last is None:
        return None
    panic, before = splats[last], splats[last - 1] if last else None
    if before is None or before.time_s is None or panic.time_s is None or not 0 <= panic.time_s - before.time_s < JUST_BEFORE_S:
        return panic.text
    return f"{before.text}\n{panic.text}"


def saved_time_s(file: Path) -> float:
    """Return the kernel's time at which a VM was saved, of the file that says it; -1 where there is none."""
    try:
        return float(file.read_text())
    except (OSError, ValueError):
        return -1.0

"""A VMM's event log, a file to which it appends JSON objects: read as it grows, and judged by each driver's rules.

The VMM writes the events, but the guest decides how many: what is read at once is bounded.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_chvm.base.text import data_from
from pytest_chvm.errors import VmError

logger = logging.getLogger("pytest_chvm")

# What a hole in the log is read as, where events were dropped: see host/keeper/logbound.py.
DROPPED = "\0"
# An event is a few hundred bytes; a longer one is not waited for.
LONGEST_EVENT = 1 << 16


@dataclass
class EventReader:
    """Reads one VM's events; `trouble` is the first error that the test must be told of."""

    vm_name: str
    path: Path
    # Reboots that the test asked for and that have not come yet.
    expected_reboots: int = 0
    trouble: VmError | None = None
    _offset: int = 0
    _pending: str = field(default="")
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def read(self) -> VmError | None:
        """Read what is new and return the first trouble there was, now or before."""
        with self._lock:
            try:
                with self.path.open("rb") as file:
                    while data := self._read_on(file.fileno()):
                        self._offset += len(data)
                        self._take(self._pending + data.decode(errors="replace"))
            except FileNotFoundError:
                return self.trouble
            return self.trouble

    def _read_on(self, fd: int) -> bytes:
        start = data_from(fd, self._offset)
        if start != self._offset:
            self._pending, self._offset = DROPPED, start
        return os.pread(fd, LONGEST_EVENT, start)

    def settle(self) -> None:
        """Treat all that has happened to the guest so far as handled; no reboot is expected any more."""
        self.read()
        self.expected_reboots, self.trouble = 0, None

    def _take(self, text: str) -> None:
        decoder = json.JSONDecoder()
        if DROPPED in text:
            # Events are objects of one line, or indented: the next one begins with a line that begins with a brace.
            before, found, rest = text.rpartition(DROPPED)[2].partition("\n{")
            text = f"{{{rest}" if found else DROPPED + before[-1:]
        text = text.lstrip()
        while text:
            try:
                event, end = decoder.raw_decode(text)
            except (ValueError, RecursionError):
                if len(text) > LONGEST_EVENT:
                    logger.warning("%s: the event monitor says what is no event: %r", self.vm_name, text[:80])
                    text = ""
                break
            if isinstance(event, dict):
                logger.debug("%s: event %s", self.vm_name, text[:end])
                self.judge(event)
            text = text[end:].lstrip()
        self._pending = text

    def judge(self, event: dict[str, Any]) -> None:
        """Take note of one event."""
        raise NotImplementedError


def open_event_log(directory: Path) -> int:
    """Return a descriptor for the VMM to write its events to, a file of `directory`."""
    return os.open(event_log(directory), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def event_log(directory: Path) -> Path:
    """Return the file that the events are in."""
    return directory / "events.json"

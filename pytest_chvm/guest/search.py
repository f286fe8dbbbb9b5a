"""Looking for a pattern on a guest's console as it grows, each byte read once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from pytest_chvm.guest.ready import LogReader

# What a match may span: each new piece is searched with so much before it.
WINDOW = 1 << 16


@dataclass
class ConsoleSearch:
    """Looks for a pattern in a serial log, from its beginning; `scan` returns the first match, or None so far."""

    log: Path
    pattern: re.Pattern[str]
    _reader: LogReader = field(init=False)

    def __post_init__(self) -> None:
        self._reader = LogReader(self.log, WINDOW)

    def scan(self) -> re.Match[str] | None:
        """Search what is new."""
        for piece in self._reader.pieces():
            if found := self.add(piece.decode(errors="replace")):
                return found
        return None

    def add(self, text: str) -> re.Match[str] | None:
        """Search a text."""
        return self.pattern.search(text)

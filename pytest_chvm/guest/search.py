"""Looking for a pattern on a guest's console as it grows, each byte read once."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass, field
from pathlib import Path

from pytest_chvm.guest.ready import LogReader

# What a match may span, in bytes: each new piece is searched with so much before it.
WINDOW = 1 << 16
# Nothing is found to begin in the first bytes of a later piece: they are what `^`, `\b` and lookbehind see before a match.
BEFORE = 1 << 10


@dataclass
class ConsoleSearch:
    """Looks for a pattern in a serial log, from its beginning; `scan` returns the first match, or None so far."""

    log: Path
    pattern: re.Pattern[str]
    _reader: LogReader = field(init=False)

    def __post_init__(self) -> None:
        self._reader = LogReader(self.log, BEFORE + WINDOW)

    def scan(self) -> re.Match[str] | None:
        """Search what is new."""
        for piece in self._reader.pieces():
            before = BEFORE if len(piece) < self._reader.offset else 0
            # A character whose bytes have not all come is left for the next time, when it is read again.
            text, start = (codecs.getincrementaldecoder("utf-8")("replace").decode(part) for part in (piece, piece[:before]))
            if found := self.pattern.search(text, len(start)):
                return found
        return None

    def add(self, text: str) -> re.Match[str] | None:
        """Search a text."""
        return self.pattern.search(text)

"""Runs of tests: what the processes of one have in common, and what they have started."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pytest_chvm.model import ProcessIdentity

# In the order of the summary; the plural adds an "s".
KINDS = ("VM", "share", "TAP")


@dataclass(frozen=True, slots=True)
class Run:
    """A run of tests, and which of its workers this process is.

    `controller`: the process whose end is the end of the run, where that is not this one. `journal`: a file that takes a word for
    each thing started, so that one that is killed is counted too.
    """

    id: str = ""
    worker: str = ""
    controller: ProcessIdentity | None = None
    journal: Path | None = None


class Started:
    """How many of each of `KINDS` this process has started for a run, and the file in which that is taken down too."""

    def __init__(self) -> None:
        self.journal: Path | None = None
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, kind: str) -> None:
        """Take down that one of `KINDS` was started."""
        with self._lock:
            self._counts[kind] += 1
            if self.journal is not None:
                fd = os.open(self.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
                os.write(fd, f"{kind}\n".encode())
                os.close(fd)

    def total(self, journals: Iterable[Path] = ()) -> Counter[str]:
        """Return how many of each kind were started, by this process and by those that wrote the journals."""
        total = Counter(self._counts)
        for journal in journals:
            if journal.exists():
                total.update(word for word in journal.read_text().split() if word in KINDS)
        return total

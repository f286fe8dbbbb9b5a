"""The test runs that this process and its workers belong to: what they have started, and what is left of it."""

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


_run = Run()
_started: Counter[str] = Counter()
_lock = threading.Lock()


def current_run() -> Run:
    """Return the run that this process's VMs belong to."""
    return _run


def begin_run(run: Run) -> None:
    """Have what is started from now on belong to a run."""
    global _run
    if run != _run:
        _run = run
        _started.clear()


def count_started(kind: str) -> None:
    """Take down that one of `KINDS` was started."""
    with _lock:
        _started[kind] += 1
        if _run.journal is not None:
            fd = os.open(_run.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.write(fd, f"{kind}\n".encode())
            os.close(fd)


def started(journals: Iterable[Path] = ()) -> Counter[str]:
    """Return how many of each kind were started, by this process and by those that wrote the journals."""
    total = Counter(_started)
    for journal in journals:
        if journal.exists():
            total.update(word for word in journal.read_text().split() if word in KINDS)
    return total

"""The test runs that this process and its workers belong to: what they have started, and what is left of it."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
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


@dataclass(eq=False, slots=True)
class Level:
    """A run and what it has started. A test of it can have another run within it, in the same process, as pytester makes them."""

    run: Run
    started: Counter[str] = field(default_factory=Counter)


_levels = [Level(Run())]
_lock = threading.Lock()


def current_level() -> Level:
    """Return the innermost run's."""
    return _levels[-1]


def begin_run(run: Run, *, within: bool = False) -> Level:
    """Have what is started from now on belong to a run; one `within` another lasts until its `end_run`."""
    if within:
        _levels.append(Level(run))
    else:
        current_level().run = run
        current_level().started.clear()
    return current_level()


def end_run(level: Level) -> None:
    """Have what is started from now on belong to the run around this one."""
    if level in _levels[1:]:
        _levels.remove(level)


def count_started(kind: str) -> None:
    """Take down that one of `KINDS` was started."""
    with _lock:
        level = current_level()
        level.started[kind] += 1
        if level.run.journal is not None:
            fd = os.open(level.run.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.write(fd, f"{kind}\n".encode())
            os.close(fd)


def started(journals: Iterable[Path] = ()) -> Counter[str]:
    """Return how many of each kind were started, in the current run by this process and by those that wrote the journals."""
    total = Counter(current_level().started)
    for journal in journals:
        if journal.exists():
            total.update(word for word in journal.read_text().split() if word in KINDS)
    return total

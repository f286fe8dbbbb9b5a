"""What takes long just now, for the person at the terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

logger = logging.getLogger("pytest_chvm")

_uncaptured: Callable[[], AbstractContextManager[object]] = nullcontext


def show_progress_with(uncaptured: Callable[[], AbstractContextManager[object]]) -> Callable[[], AbstractContextManager[object]]:
    """Have progress shown within such a context: a test runner's, that does not capture what is written in it.

    Returns what was called for that before.
    """
    global _uncaptured
    before, _uncaptured = _uncaptured, uncaptured
    return before


def show_progress(text: str) -> None:
    """Tell the person at the terminal what takes long just now."""
    logger.info("%s", text)
    # What takes half a minute must not be silent.
    stream = sys.__stderr__
    if stream is not None:
        with _uncaptured():
            stream.write(f"pytest-chvm: {text}\n")
            stream.flush()

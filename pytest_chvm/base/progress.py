"""Telling the person at the terminal what takes long."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Progress = Callable[[str], None]

logger = logging.getLogger("pytest_chvm")


def show_progress(text: str, uncaptured: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
    """Tell the person at the terminal what takes long now; `uncaptured` is a context in which output gets there."""
    logger.info("%s", text)
    # What takes half a minute must not be silent.
    stream = sys.__stderr__
    if stream is not None:
        with uncaptured():
            stream.write(f"pytest-chvm: {text}\n")
            stream.flush()

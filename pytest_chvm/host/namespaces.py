"""Named network namespaces: being in one for a moment, and only in one that is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytest_chvm.errors import InvalidConfigError

PLACE = Path("/run/netns")
CLONE_NEWNET = 0x40000000


def check_netns(netns: str) -> None:
    """Raise InvalidConfigError where there is no such named network namespace."""
    if not (PLACE / netns).exists():
        raise _missing(netns)


def _missing(netns: str) -> InvalidConfigError:
    return InvalidConfigError(f"network namespace {netns!r} does not exist: make it with 'ip netns add {netns}'")


@contextmanager
def inside(netns: str | None) -> Iterator[None]:
    """This thread is in a named network namespace in the block; None: it stays where it is.

    A socket stays in the namespace that it was made in. Raises InvalidConfigError where there is no such namespace (any more):
    pyroute2's `setns` and `IPRoute(netns=)` make one then. Raises OSError where this process may not enter it.
    """
    if netns is None:
        yield
        return
    try:
        there = os.open(PLACE / netns, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise _missing(netns) from None
    try:
        # Of the thread: that of the process is its main thread's.
        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _set(there)
            try:
                yield
            finally:
                _set(here)
        finally:
            os.close(here)
    finally:
        os.close(there)


def _set(fd: int) -> None:
    import ctypes

    # os.setns is there from Python 3.12 on.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)} (setns)")

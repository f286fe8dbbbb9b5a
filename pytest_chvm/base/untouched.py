"""Clocks, sockets and random numbers as they were before a test froze, blocked or seeded them; loaded with the plugin.

freezegun replaces the functions of `time` wherever a module has them by name, time-machine the code behind some of them; neither
touches `clock_gettime` for the clocks here. pytest-socket replaces `socket.socket`, and the `connect` of the true one.
pytest-randomly seeds `random`, and others replace what makes ids.
"""

from __future__ import annotations

import _socket
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

# linux/time.h; Python has no name for it. It is the wall clock at the last tick, up to 10 ms ago.
CLOCK_REALTIME_COARSE = 5
SECOND_NS = 10**9

# freezegun looks for the functions of `time` themselves, and does not find them in a `partial`.
monotonic_s = partial(time.clock_gettime, time.CLOCK_MONOTONIC)
monotonic_ns = partial(time.clock_gettime_ns, time.CLOCK_MONOTONIC)
_tai_ns = partial(time.clock_gettime_ns, time.CLOCK_TAI)
_coarse_ns = partial(time.clock_gettime_ns, CLOCK_REALTIME_COARSE)
random_bytes = partial(os.urandom)


def wall_clock_ns() -> int:
    """Return the host's time in nanoseconds since the epoch, also while a test has frozen or moved the clock.

    time-machine replaces CLOCK_REALTIME; CLOCK_TAI is ahead of it by a whole number of seconds.
    """
    tai_ns = _tai_ns()
    return tai_ns - round((tai_ns - _coarse_ns()) / SECOND_NS) * SECOND_NS


def wall_clock_s() -> float:
    """Return the same in seconds."""
    return wall_clock_ns() / SECOND_NS


def random_hex(size: int) -> str:
    """Return `size` random bytes as hexadecimal digits, which no seed repeats."""
    return random_bytes(size).hex()


def random_below(limit: int) -> int:
    """Return a random number from 0 to `limit` - 1, which no seed repeats."""
    # With 64 bits more than asked for, no number is noticeably more likely than another.
    return int.from_bytes(random_bytes(limit.bit_length() // 8 + 9), "big") % limit


class Socket(socket.socket):
    """A socket that works where a test forbids sockets: the original class, its patched methods taken from its base."""

    connect = _socket.socket.connect
    connect_ex = _socket.socket.connect_ex

    def accept(self) -> tuple[Socket, Any]:
        """Return a connection and its peer's address; the inherited method would use whatever `socket.socket` is by then."""
        fd, address = self._accept()  # type: ignore[attr-defined]
        return Socket(fileno=fd), address


def socket_pair(family: int, kind: int) -> tuple[Socket, Socket]:
    """Return two connected sockets."""
    one, other = _socket.socketpair(family, kind)
    return Socket(fileno=one.detach()), Socket(fileno=other.detach())


_true_socket = socket.socket
_lock = threading.RLock()
_depth = 0
_guard: type[socket.socket] = socket.socket


@contextmanager
def sockets_for_libraries() -> Iterator[None]:
    """Let libraries make sockets in the block: they use the name `socket.socket`, which a test may have replaced by a guard.

    If the test itself sets or removes the guard meanwhile, its choice stays.
    """
    global _depth, _guard
    with _lock:
        if _depth == 0:
            _guard = socket.socket
            if "ssl" not in sys.modules:
                # Its own class is derived from `socket.socket` at its import, when that must be the true one.
                socket.socket = _true_socket  # type: ignore[misc]
                import ssl  # noqa: F401
            socket.socket = Socket  # type: ignore[misc]
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0 and socket.socket is Socket:
                socket.socket = _guard  # type: ignore[misc]

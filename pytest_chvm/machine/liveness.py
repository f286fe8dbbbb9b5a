"""Asks a guest whether it is alive, also while its shell runs a command, by having it write a line to its serial console."""

from __future__ import annotations

from pathlib import Path

from pytest_chvm.base.deadline import Deadline
from pytest_chvm.base.untouched import random_hex
from pytest_chvm.base.watch import FileWatch
from pytest_chvm.guest.ready import LogReader


def question() -> tuple[str, str]:
    """Return a shell line that writes to the serial console, and the token that is in what it writes."""
    token = random_hex(8)
    # Split by quotes, so that an echo of the line does not match.
    said = f"chvm: alive {token[:8]}''{token[8:]}"
    return f"for c in /dev/ttyAMA0 /dev/ttyS0 /dev/console; do [ -c $c ] && echo {said} >$c && break; done", token


def was_answered(log: Path, token: str, deadline: Deadline, pid: int) -> bool:
    """Block until the token is in the log, the process has ended or the deadline has passed; tells whether it is there."""
    reader = LogReader(log, len(token))
    with FileWatch(log) as watch:
        ended = False
        while True:
            if any(token.encode() in piece for piece in reader.pieces()):
                return True
            if ended or deadline.expired:
                return False
            ended = watch.wait(deadline, pid)

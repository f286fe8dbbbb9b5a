"""Text of a guest or a file made safe to show: bounded, without escape sequences and control characters."""

from __future__ import annotations

import os
import re
from pathlib import Path

# ECMA-48: CSI, OSC and the like, then two-byte sequences.
ESCAPE = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]{0,4096}(?:\x07|\x1b\\|$)|\x1b[ -/]*[0-~]")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+=")


def read_tail(path: Path, limit: int) -> bytes:
    """Return the last `limit` bytes of a file; empty where there is no such file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - limit))
            return file.read(limit)
    except FileNotFoundError:
        return b""


def data_from(fd: int, offset: int) -> int:
    """Return the first position from `offset` on that has data: `offset`, or the end of the hole it is in (see logbound.py)."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError:
        # The end of the file, or a file system without holes.
        return offset


def clean(raw: bytes) -> str:
    """Return guest output as text that can be shown: no escape sequences, no control characters."""
    text = ESCAPE.sub(b"", raw).replace(b"\r\n", b"\n").replace(b"\r", b"\n").decode(errors="replace")
    return CONTROL.sub("\ufffd", text)


def clean_text(text: str) -> str:
    """Return a test's or guest's text as `clean` does its bytes; lone surrogates, which no encoding has, are replaced too."""
    return clean(text.encode(errors="surrogatepass"))


def as_one_word(text: str | bytes) -> str:
    """Return text that printf's %b turns back, of which neither a kernel nor a shell splits or expands anything."""
    return "".join(chr(byte) if byte in PLAIN else f"\\0{byte:03o}" for byte in os.fsencode(text))


def last_lines(path: Path, count: int = 20, limit: int = 16384) -> str:
    """Return the last lines of a log, cleaned and bounded, each cut at 500 characters."""
    lines = [line for line in clean(read_tail(path, limit)).split("\n") if line.strip()]
    return "\n".join(line[:500] for line in lines[-count:])


def shown_outputs(stdout: str, stderr: str, limit: int = 4000) -> str:
    """Return both outputs of a command for a message, the last `limit` characters of each, cleaned."""
    parts = []
    for name, text in (("stdout", stdout), ("stderr", stderr)):
        cleaned = clean(text.encode(errors="surrogateescape"))
        cut = f"... (the last {limit} of {len(cleaned)} characters)\n" if len(cleaned) > limit else ""
        parts.append(f"{name}: {cut}{cleaned[-limit:] or '(nothing)'}")
    return "\n".join(parts)

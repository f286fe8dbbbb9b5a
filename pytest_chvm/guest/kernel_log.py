"""Reads a kernel's log, as `dmesg -r` and as a serial console have it. Both come from the guest: bounded, never trusted."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pytest_chvm.base.text import clean
from pytest_chvm.model.kernel_log import KernelMessage

# The longest text of a message (LOG_LINE_MAX and PRINTKRB_RECORD_MAX of kernel/printk are 1 KiB).
LONGEST_MESSAGE = 4096
# "<30>[   12.345678] text", with CONFIG_PRINTK_CALLER "<30>[   12.345678][    T1] text"; without printk.time there is no time.
RECORD = re.compile(rb"<(\d{1,4})>(?:\[ *(\d{1,12}\.\d{1,9})\](?:\[ *[TC]\d+\])? ?)?(.*)", re.S)
# On a console something else may stand before it: what a program has written there, without a newline.
CONSOLE = re.compile(rb"(?:<(\d)>)?\[ *(\d{1,12}\.\d{1,9})\](?:\[ *[TC]\d+\])? (.*)", re.S)
UNSTAMPED = re.compile(rb"(?:<(\d)>)?(?:\[ *[TC]\d+\] )?(.*)", re.S)


def parse_dmesg(raw: bytes) -> list[KernelMessage]:
    """Return the messages of what `dmesg -r` prints; what is no message, like the rest of one that was cut, is passed over."""
    found = []
    for line in raw.split(b"\n"):
        if match := RECORD.match(line.rstrip(b"\r")):
            priority = int(match[1])
            time_s = None if match[2] is None else float(match[2])
            found.append(KernelMessage(time_s, priority & 7, priority >> 3, _text(match[3])))
    return found


def parse_console(raw: bytes) -> list[KernelMessage]:
    """Return the messages of a piece of a serial console; lines without a time are messages where no line has one."""
    return [message for _start, message in located_messages(raw)]


def located_messages(raw: bytes) -> Iterator[tuple[int, KernelMessage]]:
    """Yield the messages of a piece of a serial console, and at which byte its time begins, where it has none its line."""
    lines, start = [], 0
    for line in raw.split(b"\n"):
        lines.append((start, line.rstrip(b"\r")))
        start += len(line) + 1
    stamped = [(start + match.start(2), match) for start, line in lines if (match := CONSOLE.search(line))]
    for start, match in stamped or [(start, match) for start, line in lines if (match := UNSTAMPED.match(line)) and match[0]]:
        level, text = match[1], match[match.re.groups]
        time_s = float(match[2]) if match.re is CONSOLE else None
        yield start, KernelMessage(time_s, None if level is None else int(level), None, _text(text))


def _text(raw: bytes) -> str:
    return clean(raw[:LONGEST_MESSAGE]).rstrip()

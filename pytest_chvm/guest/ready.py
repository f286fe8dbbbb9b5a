"""The serial log, read as it grows: the ready marker and a kernel panic.

Whatever is in the log comes from the guest and is not trusted: it is parsed strictly, every read is bounded,
and nothing of it is shown before `text.clean`.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pytest_chvm.base.text import ESCAPE, clean, data_from

DEFAULT_MARKER = "CHVM_READY"
# A marker line is the marker and at most this many bytes: an address, a nonce, a word or two, a terminal's escape sequences and
# spaces; then the line's end, in which a terminal may have doubled the carriage return.
LONGEST_REST = 64
LONGEST_LINE_END = 3
CHUNK = 1 << 20
# A terminal's sequence that ends with what could be part of a word, just before the marker (ECMA-48): CSI, and the two- and
# three-character ones, of which `tput sgr0` writes one.
SEQUENCE = rb"\x1b(?:\[[0-?]{0,24}[ -/]{0,2}[@-~]|[ -/]{1,2}[0-~]|[0-9=>A-OQ-WYZa-z])"
# What a guest may say that it could not set up: `share0` is the first shared dir of the VM's, `nic0` its first NIC,
# `cloud-init` what its seed says; `console` and `panic` are the console for its shell and the panic device, without
# which it is ready all the same.
FAILED = re.compile(r"failed=((?:share|nic|module)\d{1,3}|disk[a-z0-9]{1,16}|console|panic|cloud-init)")
MOST_FAILED = 32

# What printk puts before a line: a level, the time, and with CONFIG_PRINTK_CALLER the task or processor. At the start of a line,
# or after a prompt where the time tells it from other text.
STAMP = rb"\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? "
# To the end of the line, which a serial port writes byte by byte.
PANIC = re.compile(
    rb"(?:(?:^|[\r\n])(?:<\d>)?(?:\[ *[TC]\d+\] )?|%s)(Kernel panic - not syncing: (?:[^\r\n]{0,199}(?=[\r\n])|[^\r\n]{200}))"
    % STAMP
)


@dataclass
class LogReader:
    """Yields what a growing file has new, in bounded pieces, each with the last `overlap` bytes before it.

    A file that shrank is read from its start again: Cloud Hypervisor truncates it when a guest that it booted reboots. The
    hole in the middle of a long log is skipped.
    """

    path: Path
    overlap: int
    offset: int = 0
    floor: int = 0

    def forget(self) -> None:
        """Never look again at what is there now."""
        try:
            self.offset = self.floor = self.path.stat().st_size
        except FileNotFoundError:
            self.offset = self.floor = 0

    def pieces(self) -> Iterator[bytes]:
        """Yield the new pieces; none while the file is not there."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            if os.fstat(fd).st_size < self.offset:
                self.offset = self.floor = 0
            while True:
                self.offset = data_from(fd, self.offset)
                start = max(self.floor, self.offset - self.overlap)
                piece = os.pread(fd, CHUNK + self.offset - start, start)
                if start + len(piece) <= self.offset:
                    return
                self.offset = start + len(piece)
                yield piece
        finally:
            os.close(fd)


@dataclass
class ReadyScanner:
    """Looks for the line `MARKER IP [nonce=NONCE]` in a serial log; `scan` remembers what it found.

    `ip` is the guest's address once it was there; `refused` says what was wrong with the last line that had the
    marker and did not count. With `nonce_required` a line without the nonce does not count, and one with another
    never does. `failed` is what the guest could not set up, as lines `MARKER failed=WHAT [nonce=NONCE]` before that one said.
    """

    log: Path
    marker: str = DEFAULT_MARKER
    nonce: str | None = None
    nonce_required: bool = False
    ip: str | None = None
    refused: str | None = None
    failed: tuple[str, ...] = ()
    _reader: LogReader = field(init=False)
    _pattern: re.Pattern[bytes] = field(init=False)

    def __post_init__(self) -> None:
        marker = self.marker.encode()
        # One more than the longest line that counts: what stands before the marker is looked at too.
        self._reader = LogReader(self.log, 1 + len(marker) + LONGEST_REST + LONGEST_LINE_END)
        # Not at the start of a line only: a login prompt or half a kernel message may stand before it. Bounded, since a guest
        # may print megabytes of markers and never a newline.
        self._pattern = re.compile(
            rb"(?:(?<![A-Za-z0-9_])|%s)%s(?![A-Za-z0-9_])(?:([^\r\n]{0,%d})\r{0,%d}\n|(?=[^\r\n]{%d}))"
            % (SEQUENCE, re.escape(marker), LONGEST_REST, LONGEST_LINE_END - 1, LONGEST_REST + 1)
        )

    def scan(self) -> str | None:
        """Read what is new and return the IP if the marker was there, now or before."""
        if self.ip is None:
            for piece in self._reader.pieces():
                for match in self._pattern.finditer(piece):
                    self.ip = self._checked(match[1])
                    if self.ip is not None:
                        return self.ip
        return self.ip

    def expect_again(self, nonce: str | None) -> None:
        """Forget what was found: the guest is about to start anew, and has to say this nonce, if any."""
        self.nonce, self.nonce_required = nonce, nonce is not None
        self.ip = self.refused = None
        self.failed = ()
        self._reader.forget()

    def _checked(self, rest: bytes | None) -> str | None:
        words = [] if rest is None else ESCAPE.sub(b"", rest).decode("ascii", errors="replace").split()
        if not words:
            self.refused = "a ready line was too long" if rest is None else "a ready line had no IP"
            return None
        failed = FAILED.fullmatch(words[0])
        address = None if failed else _address(words[0])
        if not failed and address is None:
            self.refused = f"a ready line had {words[0][:45]!r} where an IP was expected"
            return None
        nonces = [word[6:] for word in words[1:] if word.startswith("nonce=")]
        if self.nonce is not None and (nonces or self.nonce_required) and nonces != [self.nonce]:
            self.refused = "a ready line had the nonce of another VM" if nonces else "a ready line had no nonce"
            return None
        if failed and failed[1] not in self.failed and len(self.failed) < MOST_FAILED:
            self.failed += (failed[1],)
        return address


def _address(text: str) -> str | None:
    """Return the IP of a text, which may have a prefix length, as `ip addr` says it; None where it has none."""
    try:
        return str(ipaddress.ip_interface(text).ip if re.search(r"/\d{1,3}$", text) else ipaddress.ip_address(text))
    except ValueError:
        return None


@dataclass
class PanicScanner:
    """Looks for the text of a kernel panic in a serial log, as it grows, from byte `start` on."""

    log: Path
    start: int = 0
    panic: str | None = None
    _reader: LogReader = field(init=False)

    def __post_init__(self) -> None:
        self._reader = LogReader(self.log, 300, self.start, self.start)

    def scan(self) -> str | None:
        """Read what is new and return the panic's message if there was one, now or before."""
        if self.panic is None:
            for piece in self._reader.pieces():
                if match := PANIC.search(piece):
                    self.panic = clean(match[1])
                    break
        return self.panic

    def forget(self) -> None:
        """Never look again at what is there now."""
        self.panic = None
        self._reader.forget()

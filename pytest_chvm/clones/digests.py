"""Identities of files: by content, computed once, or without reading them."""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

from pytest_chvm.base.extents import data_extents
from pytest_chvm.base.lockfiles import wait_for_lock
from pytest_chvm.base.progress import Progress, show_progress

# How near a file's last change may be to the reading of it for another change to have left the file's times as they were: those of
# some file systems are in whole seconds, two of them at most (FAT).
RACY_S = 2.0
DIGESTS_DIR = "digests"
DIGEST = r"[0-9a-f]{64}"
BLOCK_SIZE = 1 << 16


def content_key(file: Path, cache: Path, progress: Progress = show_progress) -> str:
    """Return the hash of a file's content and length; computed once for each inode, size and time, and kept in the cache.

    Raises OSError where the file cannot be read or the cache not be written.
    """
    found = file.stat()
    identity = f"{found.st_dev}-{found.st_ino}-{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}"
    kept = cache / DIGESTS_DIR / f"{identity}-sized.blake2b"
    with suppress(OSError):
        # No lock, and the cache may not be writable.
        if kept.stat().st_mtime - found.st_ctime > RACY_S and re.fullmatch(DIGEST, digest := kept.read_text(errors="replace")):
            with suppress(OSError):
                os.utime(kept)
            return digest
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a+", errors="replace") as known:
        # Others that want the same digest wait for this one.
        wait_for_lock(known.fileno(), f"what {str(file)!r} holds", progress)
        known.seek(0)
        digest = known.read()
        if os.fstat(known.fileno()).st_mtime - found.st_ctime <= RACY_S or not re.fullmatch(DIGEST, digest):
            # Taken before the file is read: a change during the reading must show.
            os.utime(known.fileno())
            begun_ns = os.fstat(known.fileno()).st_mtime_ns
            digest = digest_of(file)
            known.truncate(0)
            known.write(digest)
            known.flush()
            os.utime(known.fileno(), ns=(begun_ns, begun_ns))
    return digest


def file_identity(file: Path) -> str:
    """Return what identifies a file without reading it."""
    found = file.stat()
    return f"{file}-{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"


def identity_of(file: Path) -> tuple[int, int, int, str]:
    """Return a file's size, inode, time and digest."""
    digest = digest_of(file)
    found = file.stat()
    return found.st_size, found.st_ino, found.st_mtime_ns, digest


def digest_of(file: Path) -> str:
    """Return the BLAKE2 hash of a file's length and of its blocks that are not all zeros, with their places."""
    digest = hashlib.blake2b(digest_size=32)
    next_block = 0
    with file.open("rb") as source:
        digest.update(b"%d bytes " % os.fstat(source.fileno()).st_size)
        for start, end in data_extents(source.fileno()):
            # Which parts a file system reports as data may change, but not what a block holds.
            for block in range(max(next_block, start // BLOCK_SIZE), -(-end // BLOCK_SIZE)):
                source.seek(block * BLOCK_SIZE)
                content = source.read(BLOCK_SIZE)
                if content.strip(b"\0"):
                    digest.update(b"%d " % block)
                    digest.update(content)
                next_block = block + 1
    return digest.hexdigest()

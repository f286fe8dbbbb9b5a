"""Where a file has data, and where holes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator


def data_extents(fd: int, size: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield where a file has data, as start and end; all of it on a file system without holes.

    `size`: what counts of it (default: all that it has now).
    """
    size = os.fstat(fd).st_size if size is None else size
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = min(size, os.lseek(fd, start, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.ENXIO:
                # Nothing but a hole is left, or it became shorter.
                return
            if error.errno == errno.EINVAL:
                # Nothing here knows of holes, as in /sys.
                yield end, size
                return
            raise
        if start < end:
            yield start, end

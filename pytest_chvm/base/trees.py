"""Removing directory trees, without descending into anything that is mounted in them.

Standard library only, as little of it as possible, and nothing of this package: the keeper runs it too.
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection


def remove_tree(path: str | os.PathLike[str], *, keep: Collection[str] = ()) -> list[str]:
    """Remove a file or directory tree; returns failures in words. A path that does not exist is no failure.

    Anything mounted on it or below it is left alone and reported as a failure. With `keep`, the directory itself and its entries
    of these names stay.
    """
    place = os.path.abspath(path)
    directory, name = os.path.split(place)
    try:
        parent = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"{place}: {error.strerror}"]
    try:
        return _remove(parent, name, place, keep)
    except RecursionError:
        return [f"{place}: its directories are nested too deeply"]
    finally:
        os.close(parent)


def _remove(parent: int, name: str, place: str, keep: Collection[str] = ()) -> list[str]:
    """Remove an entry of the directory `parent`, by descriptors: no link is followed, whatever is replaced meanwhile."""
    try:
        try:
            directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        except NotADirectoryError:
            # ELOOP: a symbolic link where a directory was expected.
            os.unlink(name, dir_fd=parent)
            return []
        try:
            if _mount_id(directory) != _mount_id(parent):
                return [mounted_on(place)]
            entries = [entry for entry in os.listdir(directory) if entry not in keep]
            failures = [failure for entry in entries for failure in _remove(directory, entry, os.path.join(place, entry))]
        finally:
            os.close(directory)
        if not failures and not keep:
            os.rmdir(name, dir_fd=parent)
    except FileNotFoundError:
        return []
    except OSError as error:
        # Something is mounted on this file.
        return [mounted_on(place) if error.errno == errno.EBUSY else f"{place}: {error.strerror}"]
    return failures


def mounted_on(place: str) -> str:
    """Say that a mount point was not removed."""
    busy = os.strerror(errno.EBUSY)
    return f"{place}: {busy}: it is a mount point, and what is mounted there was left as it is; umount it"


def _mount_id(fd: int) -> int:
    """Return the id of the mount an open file is reached by (proc(5), fdinfo); the device number cannot tell bind mounts apart."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as info:
        return next(int(line.split()[1]) for line in info if line.startswith(b"mnt_id:"))


def is_mount_point(path: str) -> bool:
    """Tell whether something is mounted on a directory; False where there is no such directory or it may not be opened."""
    fds: list[int] = []
    try:
        for place in (path, os.path.join(path, "..")):
            fds.append(os.open(place, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC))
        return _mount_id(fds[0]) != _mount_id(fds[1])
    except OSError:
        return False
    finally:
        for fd in fds:
            os.close(fd)

"""The cache of things built on the user's machine: each built once, under a file lock, written atomically."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pytest_chvm.base.lockfiles import try_lock, wait_for_lock
from pytest_chvm.base.progress import Progress, show_progress
from pytest_chvm.base.trees import remove_tree
from pytest_chvm.errors import HostError, InvalidConfigError, VmError


def default_cache_dir() -> Path:
    """Return the user's cache directory (XDG Base Directory Specification).

    Without a writable home, as in many containers, it is a directory below the temporary directory. Raises InvalidConfigError
    where that directory belongs to somebody else.
    """
    homes = [home for home in (os.environ.get("HOME", ""), _home_of_user()) if home.strip("/")]
    for place in [Path(os.environ.get("XDG_CACHE_HOME", "")), *(Path(home, ".cache") for home in homes)]:
        # The specification has relative paths ignored: each working directory would have a cache of its own.
        if place.is_absolute() and (os.access(place / "pytest-chvm", os.R_OK | os.X_OK) or _can_be_written(place)):
            return place / "pytest-chvm"
    directory = Path(tempfile.gettempdir(), f"pytest-chvm-cache-{os.geteuid()}")
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise InvalidConfigError(
            f"the cache {str(directory)!r}, taken for want of a home directory, is not a directory of yours alone: "
            "set CHVM_CACHE_DIR to one"
        )
    return directory


def _home_of_user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return ""


def _can_be_written(place: Path) -> bool:
    """Tell whether a directory can be written, or made."""
    there = next(path for path in (place, *place.parents) if os.path.lexists(path))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def built_once(
    target: Path,
    build: Callable[[Path], None],
    is_intact: Callable[[Path], bool] = Path.is_dir,
    *,
    mode: int = 0o755,
    try_again: bool = True,
    progress: Progress = show_progress,
) -> Path:
    """Return the directory `target`, filled by `build` if it does not exist yet or is no longer intact.

    `build` gets an empty directory, which becomes `target` by one rename, so that nobody ever sees half of it;
    others that want the same target wait for a file lock. Raises HostError where the cache cannot be written and, without
    `try_again`, where this call waited for another builder and that builder failed (being killed is no failure).
    """
    if is_intact(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target, progress) as waited:
            if is_intact(target):
                return target
            # Left by a builder that was killed: its lock is ours now.
            left = [path for path in (target, *target.parent.glob(f".{target.name}.*")) if path.exists()]
            if waited and not left and not try_again:
                raise HostError(f"{str(target)!r} is not there: whoever was building it has just failed")
            failures = [failure for path in left for failure in remove_tree(path)]
            if target.exists():
                raise HostError(f"what is left of {str(target)!r} cannot be removed: {'; '.join(failures)}; or set CHVM_CACHE_DIR")
            _build(target, build, mode)
    except VmError:
        # Some of them are OSErrors.
        raise
    except OSError as error:
        raise HostError(
            f"the cache {str(target.parent)!r} cannot be written: {error}; free some space, "
            "or set CHVM_CACHE_DIR to a directory of yours"
        ) from error
    return target


@contextmanager
def locked(target: Path, progress: Progress = show_progress) -> Iterator[bool]:
    """Hold the lock of `target`, the file `TARGET.lock`; yields whether this call had to wait for another holder.

    Raises HostError where the holder has been stopped (Ctrl-Z) for half a minute.
    """
    with open(f"{target}.lock", "ab") as lock:
        try:
            waited = wait_for_lock(lock.fileno(), str(target), progress)
        except TimeoutError as error:
            raise HostError(str(error)) from error
        yield waited


def _build(target: Path, build: Callable[[Path], None], mode: int) -> None:
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        build(unfinished)
        unfinished.chmod(mode)
        unfinished.rename(target)
    except BaseException:
        remove_tree(unfinished)
        raise


def keep_latest(used: Path, most: int) -> None:
    """Remove of the directories beside `used`, which was used just now, those used longest ago beyond `most`."""
    with suppress(OSError):
        used.touch()
        kept = [path for path in used.parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
        for old in sorted(kept, key=lambda path: path.stat().st_mtime)[:-most]:
            remove_tree(old)


def remove_unfinished(parent: Path) -> None:
    """Remove what killed builders of `built_once` left below `parent`: unfinished directories whose lock nobody holds."""
    for left in parent.glob(".*.*"):
        with suppress(OSError), (parent / f"{left.name.split('.')[1]}.lock").open("rb") as lock:
            if try_lock(lock.fileno()):
                remove_tree(left)

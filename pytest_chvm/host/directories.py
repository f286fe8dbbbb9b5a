"""Where things live on the host: run directories (sockets, leases) and the locks common to all users."""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from pytest_chvm.base.trees import remove_tree
from pytest_chvm.base.untouched import random_hex
from pytest_chvm.errors import HostError, InvalidConfigError
from pytest_chvm.host.keeper import records, remains
from pytest_chvm.host.runs import Run

# sun_path is 108 bytes with its NUL (unix(7)); the longest name below a VM's directory is well below 40.
LONGEST_RUNTIME_DIR = 60
LOCK_PLACES = ("/run/lock", "/tmp")
# /proc/sys/kernel/overflowuid
OVERFLOW_UID = 65534

logger = logging.getLogger("pytest_chvm")


def runtime_dir() -> Path:
    """Return the private directory (0700) that holds the run directories of this user's processes.

    It is short wherever the test's own directories are, so that paths of sockets below it fit. Raises InvalidConfigError
    where somebody else owns it, HostError where it cannot be made.
    """
    base = os.environ.get("XDG_RUNTIME_DIR") or ("/run" if os.geteuid() == 0 else "")
    if base and len(base) <= LONGEST_RUNTIME_DIR and os.access(base, os.W_OK | os.X_OK):
        directory = Path(base, "pytest-chvm")
    else:
        temporary = tempfile.gettempdir()
        if len(temporary) > LONGEST_RUNTIME_DIR:
            temporary = "/tmp"
        directory = Path(temporary, f"pytest-chvm-{os.geteuid()}")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"the run directory {str(directory)!r} cannot be made: {error}; set XDG_RUNTIME_DIR") from error
    if not _is_private(directory):
        raise InvalidConfigError(
            f"the run directory {str(directory)!r} is not a directory of yours alone (0700); remove it, or set XDG_RUNTIME_DIR"
        )
    return directory


def runtime_dirs() -> list[Path]:
    """Return all existing runtime directories of this user, in whichever environment they were made."""
    user = os.geteuid()
    bases = [os.environ.get("XDG_RUNTIME_DIR"), "/run" if user == 0 else None, f"/run/user/{user}"]
    places = [Path(base, "pytest-chvm") for base in bases if base]
    places += [Path(base, f"pytest-chvm-{user}") for base in dict.fromkeys((tempfile.gettempdir(), "/tmp"))]
    return [place for place in dict.fromkeys(places) if _is_private(place)]


def _is_private(directory: Path) -> bool:
    try:
        found = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def make_owner_dir(run: Run) -> Path:
    """Make the directory of this process's VMs, with who owns it in `owner.json`."""
    me = os.getpid()
    owner = {"boot_id": remains.boot_id(), "pid": me, "start_time_ticks": remains.start_time_ticks(me)}
    record = json.dumps({**owner, "run": run.id, "worker": run.worker})
    while True:
        directory = runtime_dir() / random_hex(4)
        try:
            directory.mkdir(mode=0o700)
            (directory / records.OWNER_FILE).write_text(record)
        except (FileExistsError, FileNotFoundError):
            # The name is taken, or the last worker of another run has just removed the parent directory.
            continue
        except OSError as error:
            # A full disk, most likely.
            remove_tree(directory)
            with suppress(OSError):
                directory.parent.rmdir()
            raise HostError(
                f"the disk of the run directory {str(directory.parent)!r}: {error.strerror}; free it, or set XDG_RUNTIME_DIR"
            ) from error
        return directory


def common_lock_dir() -> Path:
    """Return the directory of locks that all users of the machine share; it is as open as /tmp.

    All users get the same one wherever there is a place that all can write to. Raises HostError where this user can write to
    no such place, or cannot trust it.
    """
    # On some distributions only root can write to /run/lock: root and other users would have two budgets.
    open_to_all = [base for base in LOCK_PLACES if _is_open_to_all(base)]
    if not open_to_all:
        _say_once(
            f"neither {' nor '.join(LOCK_PLACES)} is open to all users: memory and subnets are shared out for each user alone"
        )
    refused = []
    for base in open_to_all or [base for base in LOCK_PLACES if os.access(base, os.W_OK | os.X_OK)]:
        directory = Path(base, "pytest-chvm")
        if not os.path.lexists(directory):
            with suppress(OSError):
                _make_open(directory)
        if (why := _why_no_lock_dir(directory)) is None:
            return directory
        refused.append(f"{directory} {why}")
        _say_once(f"{refused[-1]}: memory and subnets may be shared out with other users' runs in another place")
    raise HostError(f"no directory for locks: {'; '.join(refused) or ' and '.join(LOCK_PLACES) + ' cannot be written'}")


def _is_open_to_all(base: str) -> bool:
    try:
        found = Path(base).stat()
    except OSError:
        return False
    return found.st_mode & 0o1777 == 0o1777 and _is_mine_or_roots(found)


def _is_mine_or_roots(found: os.stat_result) -> bool:
    # In a user namespace the host's root has the overflow id.
    return found.st_uid in (0, os.geteuid(), OVERFLOW_UID)


def _why_no_lock_dir(directory: Path) -> str | None:
    """Return why locks in a directory could not be made or trusted; None where they can."""
    try:
        found = directory.lstat()
    except OSError as error:
        return f"cannot be made or looked at ({error.strerror})"
    if not stat.S_ISDIR(found.st_mode):
        return "is no directory"
    if not found.st_mode & stat.S_ISVTX and (found.st_mode & 0o022 or not _is_mine_or_roots(found)):
        return f"is another user's (uid {found.st_uid}, mode {found.st_mode & 0o7777:04o}), who can take locks away: remove it"
    if not os.access(directory, os.W_OK | os.X_OK):
        return f"cannot be written (uid {found.st_uid}, mode {found.st_mode & 0o7777:04o}): remove it"
    return None


@lru_cache(maxsize=16)
def _say_once(text: str) -> None:
    logger.warning("%s", text)


def _make_open(directory: Path) -> None:
    """Make a directory that is open to all from the moment it is there, whatever the umask."""
    unfinished = Path(tempfile.mkdtemp(prefix=".pytest-chvm.", dir=directory.parent))
    unfinished.chmod(0o1777)
    try:
        unfinished.rename(directory)
    except OSError:
        # Another process has made it meanwhile, and has locks in it.
        unfinished.rmdir()

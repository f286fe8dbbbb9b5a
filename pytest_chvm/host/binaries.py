"""Finding the programs of the host, and telling a broken one from a missing one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pytest_chvm.errors import MissingRequirementError

VERSION_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Binary:
    """A program that answered `--version` with status 0; `version` is the first line of what it said."""

    path: Path
    version: str


def find_binary(name: str, places: Sequence[str], install: str, override: Path | None = None) -> Binary:
    """Return the program `name` from PATH, else from `places` (directories), or the one at `override`.

    It must answer `--version` with status 0. Raises MissingRequirementError: one that is there but fails is reported,
    not skipped; where there is none, the message names the places looked at and ends with `install`.
    """
    if override is not None:
        return _checked(override, name)
    on_path = shutil.which(name)
    candidates = [on_path] if on_path else [os.path.join(place, name) for place in places]
    for candidate in candidates:
        if os.access(candidate, os.X_OK) and os.path.isfile(candidate):
            return _checked(Path(candidate), name)
    raise MissingRequirementError(f"{name} was not found: looked on PATH and in {', '.join(places)}; {install}")


def _checked(path: Path, name: str) -> Binary:
    try:
        found = path.stat()
    except OSError as error:
        raise MissingRequirementError(f"{name} at {str(path)!r} cannot be used: {error.strerror}") from error
    answer = _version_of(path, found.st_ino, found.st_mtime_ns)
    if isinstance(answer, str):
        raise MissingRequirementError(f"{name} at {str(path)!r} does not work: {answer}; install it again, or name another")
    return answer


@lru_cache(maxsize=32)
def _version_of(path: Path, _inode: int, _mtime_ns: int) -> Binary | str:
    try:
        done = subprocess.run(
            [path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=VERSION_TIMEOUT_S, check=False
        )
    except OSError as error:
        return f"it cannot be run ({error.strerror})"
    except subprocess.TimeoutExpired:
        return f"'--version' gave no answer within {VERSION_TIMEOUT_S:g} s"
    text = (done.stdout or done.stderr).decode(errors="replace").strip()
    if done.returncode != 0:
        return f"'--version' ended with status {done.returncode}: {text[:200] or 'and no message'}"
    return Binary(path, text.split("\n")[0][:200])

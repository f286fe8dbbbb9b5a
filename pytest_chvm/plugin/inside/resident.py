"""The pytest that waits in a guest, all imported: what it needs of the host's files, found out by running it here once."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytest_chvm.base.progress import Progress
from pytest_chvm.errors import HostError
from pytest_chvm.model import Resident
from pytest_chvm.plugin.inside import program

LIST_TIMEOUT_S = 120.0
# Of the environment, what a Python takes note of when it starts, and pytest when it loads its plugins.
TAKEN_NOTE_OF = ("PYTHON", "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "PYTEST_PLUGINS", "LANG", "LC_", "LD_LIBRARY_PATH")


@dataclass(frozen=True, slots=True)
class _Listed:
    """Files, with what they were like."""

    files: tuple[tuple[str, int, int], ...]

    @property
    def is_as_it_was(self) -> bool:
        return all(_like(path) == (path, time_ns, size) for path, time_ns, size in self.files)


def _like(path: str) -> tuple[str, int, int]:
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return path, -1, -1
    # A compiled file says by itself what it is compiled from, and is written anew for nothing.
    return path, 0 if path.endswith(".pyc") else found.st_mtime_ns, found.st_size


def resident_pytest(config: pytest.Config, cache: Path, progress: Progress) -> Resident:
    """Return the pytest that waits for tests of this run; what it needs is kept in the cache until a file of it changes.

    Raises HostError where it does not run here.
    """
    arguments = _plugin_arguments(config)
    given = {name: value for name, value in os.environ.items() if name.startswith(TAKEN_NOTE_OF)}
    # Compiled out here, where it is quick, whatever the environment says.
    words = [*(word for word in interpreter() if word != "-B"), program.__file__]
    # Where plugins may have come or gone.
    installed = [_like(directory) for directory in sys.path if directory.endswith(("site-packages", "dist-packages"))]
    key = hashlib.sha256(json.dumps([words, arguments, given, installed, sys.version]).encode()).hexdigest()[:32]
    directory = cache / "inside"
    compiled = {"PYTHONPYCACHEPREFIX": os.fspath(directory / "compiled"), "PYTHONDONTWRITEBYTECODE": ""}
    # Each job has its own; what differs from run to run would make another template.
    environment = {"PATH": os.defpath, "HOME": os.environ.get("HOME", "/"), **given, **compiled}
    record = directory / f"{key}.json"
    listed = _read(record)
    if listed is None or not listed.is_as_it_was:
        progress("finding out what a pytest in a guest needs of this machine's files")
        listed = _list([*words, "list", *arguments], environment)
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = record.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(listed.files))
        unfinished.replace(record)
    files = tuple(Path(path) for path, _time_ns, _size in listed.files)
    return Resident((*words, "wait", *arguments), tuple(sorted(environment.items())), files)


def interpreter() -> list[str]:
    """Return the words that start an interpreter like this one, as multiprocessing does it."""
    return [sys.executable, *subprocess._args_from_interpreter_flags()]  # type: ignore[attr-defined]


def _plugin_arguments(config: pytest.Config) -> list[str]:
    """Return the arguments that say which plugins are not loaded, wherever this run has been told so."""
    # Without the one it cannot do anything; the other makes no difference.
    needless = ("no:terminal", "no:cacheprovider")
    named = dict.fromkeys(name.strip() for name in config.getoption("plugins"))
    unwanted = [f"-p{name}" for name in named if name.startswith("no:") and name not in needless]
    return [*unwanted, *(["--disable-plugin-autoload"] if config.getoption("disable_plugin_autoload", False) else [])]


def _read(record: Path) -> _Listed | None:
    try:
        return _Listed(tuple((path, time_ns, size) for path, time_ns, size in json.loads(record.read_text())))
    except (OSError, ValueError):
        return None


def _list(command: list[str], environment: dict[str, str]) -> _Listed:
    try:
        # The second time from what was compiled in the first.
        for _time in range(2):
            done = subprocess.run(
                command, env=environment, cwd="/", capture_output=True, text=True, timeout=LIST_TIMEOUT_S, check=True
            )
        return _Listed(tuple(_like(path) for path in json.loads(done.stdout)))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        said = getattr(error, "stderr", None) or ""
        raise HostError(f"a pytest that is to wait in a guest does not run here: {error}\n{said[-2000:]}") from error

"""A pytest in a guest, as it is seen from out here: started, asked for tests, its answers taken apart."""

from __future__ import annotations

import base64
import binascii
import json
import os
import shlex
import sys
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Protocol

import pytest

from pytest_chvm.base.untouched import random_hex
from pytest_chvm.errors import CommandTimeoutError, GuestError, VmIOError
from pytest_chvm.model import CommandResult
from pytest_chvm.plugin.inside import program
from pytest_chvm.plugin.inside.resident import TAKEN_NOTE_OF, interpreter

# What a program in the guest has printed is shown up to here.
OUTPUT_BYTES = 1 << 14
# Of the host's session, of no use to a pytest in a guest, or telling coverage to measure on its own account.
NOT_PASSED_ON = (
    "COV_CORE_",
    "COVERAGE_PROCESS_",
    "PYTEST_XDIST_",
    "XDG_RUNTIME_DIR",
    "DBUS_",
    "SSH_AUTH_SOCK",
    "PYTEST_CURRENT_TEST",
)


class Runs(Protocol):
    """What runs commands in the guest, as a `Vm` does."""

    def run(self, command: str, *, timeout: float | None = ..., input: str | None = ...) -> CommandResult:
        """Run one and return what it did."""


class PytestEndedError(GuestError):
    """The pytest in the guest has ended before its test had."""


class GuestPytest:
    """A pytest in a guest that runs tests of one file; `waits`: the guest has one already that waits for them.

    Raises what `Vm.run` does when the guest dies meanwhile.
    """

    def __init__(self, guest: Runs, *, waits: bool) -> None:
        self._guest = guest
        self._waits = waits
        self.directory = f"/tmp/chvm-inside-{random_hex(8)}"
        # The directory with its FIFOs, and with what it prints.
        self._fifos = program.DIRECTORY if waits else self.directory
        self._printed = 0

    def start(self, item: pytest.Item, coverage: Mapping[str, Any] | None, timeout: float) -> None:
        """Start it, or have the one that waits begin, and wait until it has collected the tests of an item's file."""
        job = {**_job(item, coverage), "directory": self.directory}
        if self._waits:
            self.ask(timeout, **job)
        else:
            # Not as the command itself: that is in the event log, and the environment may have secrets.
            begin = f"umask 077; cat >{self.directory}.sh && . {self.directory}.sh"
            self._asked(begin, _script(job, self.directory), timeout)

    def ask(self, timeout: float | None, **what: object) -> dict[str, Any]:
        """Ask for something, or for what comes next, and return the answer, which is waited for at most so many seconds."""
        command = f"cat >{self._fifos}/ask && cat {self._fifos}/answer"
        return self._asked(command, f"{json.dumps(what)}\n", timeout)

    def printed(self) -> str:
        """Return what the program has printed since the last call, its last 16 KiB."""
        text = self._guest.run(f"tail -c +{self._printed + 1} {self._fifos}/out").stdout_bytes
        self._printed += len(text)
        return text[-OUTPUT_BYTES:].decode(errors="replace")

    def coverage(self, timeout: float) -> bytes | None:
        """End it, and return the file with the data of coverage.py that it has measured."""
        try:
            return base64.b64decode(self.ask(timeout, finish=True).get("coverage", ""), validate=True) or None
        except (binascii.Error, TypeError) as error:
            raise VmIOError(f"the pytest in the guest gave no data of coverage.py: {error}") from error

    def _asked(self, command: str, data: str, timeout: float | None) -> dict[str, Any]:
        try:
            return self._taken_apart(self._guest.run(command, input=data, timeout=timeout))
        except CommandTimeoutError as error:
            error.add_note(f"The pytest in the guest has printed:\n{self.printed() or '(nothing)'}")
            raise

    def _taken_apart(self, done: CommandResult) -> dict[str, Any]:
        try:
            # It is one line. The one that says that the program has ended can come twice.
            answer = json.loads(done.stdout.partition("\n")[0])
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise VmIOError(
                f"the pytest in the guest gave no answer that can be read: {done.stdout[:200]!r}; {done.stderr[-OUTPUT_BYTES:]}"
            )
        if "ended" in answer:
            raise PytestEndedError(
                f"the pytest in the guest has ended, with exit status {answer['ended']!r}, before the test had. It printed last:\n"
                f"{self.printed() or '(nothing)'}"
            )
        return answer


def _script(job: Mapping[str, Any], directory: str) -> str:
    """Return what starts a pytest in the guest."""
    taken = (name for name in job["environment"] if name.startswith(TAKEN_NOTE_OF) and name.isidentifier())
    lines = [
        f"chvm_directory={directory}",
        f"chvm_job={shlex.quote(json.dumps(job))}",
        *(f"export {name}={shlex.quote(job['environment'][name])}" for name in taken),
        f"set -- {shlex.join([*interpreter(), program.__file__, 'run'])}",
    ]
    return "\n".join([*lines, files(__package__).joinpath("start.sh").read_text()])


def _job(item: pytest.Item, coverage: Mapping[str, Any] | None) -> dict[str, Any]:
    config = item.config
    mask = os.umask(0o077)
    os.umask(mask)
    arguments = [os.fspath(argument) for argument in config.invocation_params.args]
    return {
        "environment": {name: value for name, value in os.environ.items() if not name.startswith(NOT_PASSED_ON)},
        "place": os.fspath(config.invocation_params.dir),
        "mask": mask,
        "path": sys.path,
        "argv": sys.argv,
        "pycache_prefix": sys.pycache_prefix,
        "dont_write_bytecode": sys.dont_write_bytecode,
        # It measures by itself.
        "args": [*arguments, *(["--no-cov"] if config.pluginmanager.hasplugin("pytest_cov") else [])],
        "file": os.fspath(item.path),
        "markers": config.getini("markers"),
        "coverage": coverage,
    }

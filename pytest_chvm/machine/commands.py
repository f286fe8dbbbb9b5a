"""What a test does in a guest: commands, processes, files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_chvm.guest import fetch, files
from pytest_chvm.guest.commands import place_of, shown
from pytest_chvm.machine.events import COMMAND, GET, POPEN, PUT
from pytest_chvm.machine.machine import RUN_TIMEOUT_S, Machine
from pytest_chvm.machine.process import GuestProcess
from pytest_chvm.model import CommandResult


class GuestCommands:
    """The part of `Vm` that works in the guest."""

    _machine: Machine

    def run(
        self,
        command: str | Sequence[str],
        *,
        timeout: float | None = RUN_TIMEOUT_S,
        input: str | bytes | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> CommandResult:
        """Run a command in the guest and return what it did: a `str` goes to `sh`, a sequence is one program's arguments.

        It runs in the directory `cwd` of the guest's, with the variables `env` beside those of the guest's environment, as the user
        of that name, whose HOME, USER and LOGNAME it has; without them as the guest's console shell does: root, mostly.
        Several threads may do so at once. `timeout` is seconds (None, 0 or infinity: no limit); CommandTimeoutError after it, when
        the command and all that it started in the guest are killed.
        Raises GuestCommandError where there is no such directory or user, another GuestError or HypervisorError at once when the
        guest dies meanwhile, VmIOError where no shell answers.
        """
        place = place_of(cwd, env, user)
        with self._machine.log.timed(COMMAND, command=str(command), returncode=None) as outcome:
            done = self._machine.run(command, timeout=timeout, input=_bytes(input), place=place)
            outcome["returncode"] = done.returncode
        return done

    def check_output(
        self,
        command: str | Sequence[str],
        *,
        timeout: float | None = RUN_TIMEOUT_S,
        input: str | bytes | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> str:
        """Run a command that must succeed and return its standard output; raises GuestCommandError with both outputs."""
        done = self.run(command, timeout=timeout, input=input, cwd=cwd, env=env, user=user)
        self._machine.check_succeeded(done)
        return done.stdout

    def popen(
        self,
        command: str | Sequence[str],
        *,
        input: str | bytes | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> GuestProcess:
        """Start a process in the guest that runs while the test goes on, and return it once it runs; it ends with the VM.

        The arguments are those of `run`, which raises the same. Several may run at once, and other commands beside them.
        """
        place = place_of(cwd, env, user)
        with self._machine.log.timed(POPEN, command=str(command)):
            process = self._machine.popen(command, input=_bytes(input), place=place)
        return GuestProcess(self._machine, process, shown(command))

    def put(self, src: str | os.PathLike[str], dst: str, *, timeout: float | None = RUN_TIMEOUT_S) -> None:
        """Copy a file or directory of the host's into the guest; see `pytest_chvm.guest.files.put`.

        `timeout`: CommandTimeoutError after so many seconds without progress (None: no limit).
        """
        with self._machine.log.timed(PUT, source=os.fspath(src), destination=os.fspath(dst)):
            files.put(lambda script, data: self._machine.run(script, input=data, timeout=timeout), Path(src), os.fspath(dst))

    def get(self, src: str, dst: str | os.PathLike[str], *, timeout: float | None = RUN_TIMEOUT_S) -> Path:
        """Copy a file or directory of the guest's to the host and return its path there; see `pytest_chvm.guest.fetch.get`.

        `timeout`: CommandTimeoutError after so many seconds without progress (None: no limit).
        """
        with self._machine.log.timed(GET, source=os.fspath(src), destination=os.fspath(dst)):
            return fetch.get(lambda script, data: self._machine.run(script, input=data, timeout=timeout), os.fspath(src), Path(dst))


def _bytes(text: str | bytes | None) -> bytes | None:
    return text.encode(errors="surrogateescape") if isinstance(text, str) else text

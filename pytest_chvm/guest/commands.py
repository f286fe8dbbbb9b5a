"""Commands as a guest's `sh` is told them: with a directory, an environment and a user of their own, where that is asked for."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pytest_chvm.base.untouched import random_hex
from pytest_chvm.errors import InvalidConfigError

# Linux takes no argument of 128 KiB (MAX_ARG_STRLEN, execve(2)).
LONGEST_AS_USER = 100_000
NAME_OF_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
NAME_OF_USER = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.@-]*\$?")
# What a script ends with that did not get as far as the command.
REFUSED = 125


class Script(str):
    """A script for the guest's `sh` that runs a command of the test's, which is what messages show."""

    command: str | tuple[str, ...]

    def __new__(cls, script: str, command: str | tuple[str, ...]) -> Script:
        """Make one of its text, and of the command that it runs."""
        made = super().__new__(cls, script)
        made.command = command
        return made

    def __repr__(self) -> str:
        return repr(self.command)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a command runs: a directory of the guest's, variables beside those of its environment, a user by name.

    `token` is on the line by which the guest says that it has no such directory or user.
    """

    cwd: str | os.PathLike[str] | None
    env: Mapping[str, str] | None
    user: str | None
    token: str

    def check_script(self) -> str:
        """Return what tells whether there is such a place in the guest: it ends with 0, or as `refusal` understands it."""
        return f"{self._enter()}true"

    def script(self, command: str | Sequence[str]) -> str:
        """Return what runs a command there. Raises InvalidConfigError for a command that cannot be one."""
        inner = self._variables() + script_of(command)
        if self.user is not None:
            if len(os.fsencode(inner)) > LONGEST_AS_USER:
                raise InvalidConfigError(
                    f"a command of more than {LONGEST_AS_USER} bytes, with its environment, cannot be run with user={self.user!r}: "
                    "put it into the guest as a file, and run that"
                )
            inner = self._as_user(shlex.quote(inner))
        return self._enter() + inner

    def refusal(self, returncode: int, stderr: str) -> str | None:
        """Return in words what the guest does not have, by what a script of ours has done; None where it ran the command."""
        if returncode != REFUSED or not stderr.startswith(self.token):
            return None
        what = stderr.removeprefix(self.token).strip()
        if what == "cwd":
            return f"cwd={os.fspath(self.cwd or '')!r} is no directory of the guest's"
        if what == "user":
            return f"user={self.user!r}: the guest has no such user (its 'id' knows none of that name)"
        return f"user={self.user!r}: the shell on the guest's console is not root's, and cannot become another user"

    def _refuse(self, what: str) -> str:
        return f"{{ echo '{self.token} {what}' >&2; exit {REFUSED}; }}"

    def _enter(self) -> str:
        words = ""
        if self.user is not None:
            words += f"id -u {self.user} >/dev/null 2>&1 || {self._refuse('user')}; "
            words += f'[ "$(id -u)" = 0 ] || {self._refuse("root")}; '
        if self.cwd is not None:
            words += f"CDPATH= cd -- {shlex.quote(os.fspath(self.cwd))} >/dev/null 2>&1 || {self._refuse('cwd')}; "
        return words

    def _variables(self) -> str:
        if not self.env:
            return ""
        return f"export {' '.join(f'{name}={shlex.quote(value)}' for name, value in self.env.items())}\n"

    def _as_user(self, inner: str) -> str:
        # util-linux's setpriv execs; BusyBox's cannot change users, and there su execs too.
        switch = f'setpriv --reuid={self.user} --regid="$(id -g {self.user})" --init-groups'
        return (
            f"HOME=~{self.user} USER={self.user} LOGNAME={self.user}; export HOME USER LOGNAME\n"
            f"{switch} true 2>/dev/null && exec {switch} sh -c {inner}\n"
            f"exec su -s /bin/sh -c {inner} {self.user}"
        )


def place_of(cwd: str | os.PathLike[str] | None, env: Mapping[str, str] | None, user: str | None) -> Place | None:
    """Return where a command is to run; None for the guest's own. Raises InvalidConfigError for what cannot be one."""
    if cwd is None and not env and user is None:
        return None
    if cwd is not None and (not isinstance(cwd, str | os.PathLike) or not isinstance(os.fspath(cwd), str) or not os.fspath(cwd)):
        raise InvalidConfigError(f"cwd={cwd!r}: expected a directory of the guest's, as str or PathLike")
    if user is not None and not (isinstance(user, str) and NAME_OF_USER.fullmatch(user)):
        raise InvalidConfigError(f"user={user!r}: expected the name of a user of the guest's")
    if not isinstance(env, Mapping | None):
        raise InvalidConfigError(f"env={env!r}: expected a mapping of names to values, both str")
    for name, value in (env or {}).items():
        if not isinstance(name, str) or not NAME_OF_VARIABLE.fullmatch(name) or not isinstance(value, str):
            raise InvalidConfigError(
                f"env={{{name!r}: {value!r}}}: expected a variable's name (letters, digits, '_') and its value, both str"
            )
    return Place(cwd, env, user, random_hex(16))


def script_of(command: str | Sequence[str]) -> str:
    """Return a command as a script for `sh`; raises InvalidConfigError for what cannot be one."""
    if isinstance(command, str):
        script = command
    elif isinstance(command, Sequence) and command and not isinstance(command, bytes):
        script = "exec " + shlex.join(os.fsdecode(word) for word in command)
    else:
        raise InvalidConfigError(f"command {command!r}: expected a string for sh, or a list of one program's arguments")
    if "\0" in script:
        raise InvalidConfigError("a command cannot have a NUL")
    return script


def shown(command: str | Sequence[str]) -> str | tuple[str, ...]:
    """Return a command as results and messages have it, also one that cannot be run."""
    if isinstance(command, str):
        return command
    return tuple(os.fsdecode(word) if isinstance(word, str | bytes | os.PathLike) else repr(word) for word in command)

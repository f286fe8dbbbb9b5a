"""What of its kernel's modules a VM has loaded when it is ready."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pytest_chvm.errors import InvalidConfigError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
PARAMETER = re.compile(r"[A-Za-z0-9_.-]+(=\S*)?")


def checked_modules(what: str, modules: object) -> tuple[str, ...]:
    """Return modules as `name` or `name parameter=value ...`; raises InvalidConfigError for what cannot be any; `what` names it."""
    if isinstance(modules, str | bytes) or not isinstance(modules, Sequence):
        raise InvalidConfigError(f"{what}={modules!r}, expected a list like ['btrfs', 'dummy numdummies=2']")
    checked = []
    for each in modules:
        words = each.split() if isinstance(each, str) else []
        if not words or not NAME.fullmatch(words[0]) or not all(map(PARAMETER.fullmatch, words[1:])) or "\0" in each:
            raise InvalidConfigError(
                f"{what} has {each!r}, expected a module's name, and behind it its parameters: 'dummy numdummies=2', without "
                "spaces in their values"
            )
        checked.append(" ".join(words))
    return tuple(checked)


def module_name(module: str) -> str:
    """Return the name of a module, or of one with parameters, as the kernel has it: with underscores."""
    return module.split()[0].replace("-", "_")

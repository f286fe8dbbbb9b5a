"""What a pytest finds out about its plugins each time it starts, found out once: it takes long in an emulated guest.

All of it is what pytest and pluggy would find themselves, and in their own order. Where a module is not as it was when they looked
at it, or a version of theirs does it in another way, they look again. Loaded before pytest's plugins, of which this package is one:
nothing of it is imported here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import cached_property, lru_cache
from types import FunctionType, ModuleType
from typing import Any


def remember() -> None:
    """Have pytest remember, from now on."""
    _remember_distributions()
    for name in ("pluggy._impl", "pluggy._hooks"):
        _replace(name, "varnames", _remembering_by_function)
    _replace("pluggy._manager", "_static_hook_attr", _quick_for_functions)
    fixtures = importlib.import_module("_pytest.fixtures")
    if not hasattr(fixtures, "dir"):
        fixtures.dir = _Fixtures()  # type: ignore[attr-defined]


def forget_distributions() -> None:
    """Have what is installed looked up again: plugins are loaded, and tests see what is there."""
    importlib.metadata.distributions = getattr(importlib.metadata.distributions, "original", importlib.metadata.distributions)


def _remember_distributions() -> None:
    found = [_remembering(distribution) for distribution in importlib.metadata.distributions()]
    original = importlib.metadata.distributions

    def distributions(**arguments: Any) -> Any:
        return original(**arguments) if arguments else iter(found)

    distributions.original = original  # type: ignore[attr-defined]
    importlib.metadata.distributions = distributions


def _remembering(distribution: importlib.metadata.Distribution) -> importlib.metadata.Distribution:
    """Return a distribution that reads and parses each of its files once."""
    kind = type(distribution)
    parts = {name: cached_property(getattr(kind, name).fget) for name in ("entry_points", "files", "metadata")}
    for name, part in parts.items():
        part.__set_name__(kind, name)
    distribution.read_text = lru_cache(distribution.read_text)  # type: ignore[method-assign]
    distribution.__class__ = type(kind.__name__, (kind,), parts)
    return distribution


def _replace(module: str, name: str, made: Callable[[Any], Any]) -> None:
    try:
        place = importlib.import_module(module)
    except ImportError:
        return
    if hasattr(place, name):
        setattr(place, name, made(getattr(place, name)))


def _remembering_by_function(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `pluggy`'s `varnames`, which parses a function's signature."""
    known: dict[Any, tuple[Any, Any]] = {}

    def varnames(function: Any, *arguments: Any, **options: Any) -> Any:
        if type(function) is not FunctionType or arguments or options:
            return original(function, *arguments, **options)
        code, names = known.get(function, (None, None))
        if code is not function.__code__:
            names = original(function)
            known[function] = function.__code__, names
        return names

    return varnames


def _quick_for_functions(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `pluggy`'s `_static_hook_attr`, which goes through the classes of what it looks at, but not for modules' functions."""

    def static_hook_attr(holder: Any, name: str) -> Any:
        if type(holder) is ModuleType and type(found := vars(holder).get(name)) is FunctionType:
            return found, found
        return original(holder, name)

    return static_hook_attr


class _Fixtures:
    """In place of `dir` where pytest looks for fixtures: of a module that was looked at before, the names that may be some."""

    def __init__(self) -> None:
        self._known: dict[ModuleType, tuple[list[tuple[str, Any]], list[str]]] = {}

    def __call__(self, holder: Any) -> list[str]:
        if type(holder) is not ModuleType:
            return dir(holder)
        known = self._known.get(holder)
        if known is None or not _is_same(known[0], vars(holder)):
            names = [name for name in dir(holder) if _may_be_fixture(vars(holder).get(name, holder))]
            known = self._known[holder] = list(vars(holder).items()), names
        return known[1]


def _is_same(before: list[tuple[str, Any]], now: dict[str, Any]) -> bool:
    return len(before) == len(now) and all(now.get(name) is value for name, value in before)


def _may_be_fixture(value: Any) -> bool:
    """Tell whether pytest may take something for a fixture, or for one that is wrapped and cannot be one."""
    try:
        kind = type(value).__name__
        return kind == "FixtureFunctionDefinition" or hasattr(value, "__wrapped__") or hasattr(value, "_pytestfixturefunction")
    except BaseException:
        # What raises for an attribute pytest has its own way with.
        return True

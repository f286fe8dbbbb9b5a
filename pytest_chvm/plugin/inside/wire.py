"""Reports and warnings between the two pytests, as JSON. What comes from a guest is looked at closely."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest

OUTCOMES = ("passed", "failed", "skipped")
PHASES = ("setup", "call", "teardown")


def unpack_report(item: pytest.Item, data: Any) -> pytest.TestReport:
    """Return a report of a test that its guest has sent; raises ValueError for what is none."""
    if not isinstance(data, dict):
        raise ValueError("a report that is no mapping")
    given = {key: _as_it_was(key, value) for key, value in data.items()}
    try:
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=given)
    except Exception as error:
        raise ValueError(f"a report that cannot be read: {error!r}") from error
    if not isinstance(report, pytest.TestReport) or report.when not in PHASES or report.outcome not in OUTCOMES:
        raise ValueError("a report that is none of a test")
    if report.outcome == "skipped" and not hasattr(report, "wasxfail") and not _is_place(report.longrepr):
        raise ValueError("a skip without a place and a reason")
    if not isinstance(report.duration, int | float):
        raise ValueError(f"a duration of {report.duration!r}")
    # Under xdist it may have a suffix out here; a guest does not say which test it was.
    report.nodeid, report.location = item.nodeid, item.location
    return report


def _as_it_was(key: str, value: Any) -> Any:
    """Return a value of a report with the tuples that JSON has made lists."""
    if key in ("location", "longrepr") and isinstance(value, list):
        return tuple(value)
    if key in ("sections", "user_properties") and isinstance(value, list):
        return [tuple(part) if isinstance(part, list) else part for part in value]
    return value


def _is_place(longrepr: Any) -> bool:
    return isinstance(longrepr, tuple) and len(longrepr) == 3 and isinstance(longrepr[0], str) and isinstance(longrepr[2], str)


def pack_warning(warning: warnings.WarningMessage, location: Any) -> dict[str, Any]:
    """Return a warning, and where it was given, for JSON."""
    category = warning.category
    return {
        "category": [category.__module__, category.__qualname__],
        "message": str(warning.message),
        "filename": warning.filename,
        "lineno": warning.lineno,
        "location": list(location) if location else None,
    }


def relay_warning(item: pytest.Item, data: Any) -> None:
    """Give a warning of a guest to this run's plugins; raises ValueError for what is none."""
    if not isinstance(data, dict) or not isinstance(data.get("message"), str) or not isinstance(data.get("filename"), str):
        raise ValueError("a warning that is none")
    if not isinstance(data.get("lineno"), int):
        raise ValueError("a warning without a line")
    category = _category(data.get("category"))
    message = warnings.WarningMessage(
        # Its class may want other arguments.
        message=UserWarning(data["message"]),
        category=category,
        filename=data["filename"],
        lineno=data["lineno"],
    )
    place = data.get("location")
    item.config.hook.pytest_warning_recorded.call_historic(
        kwargs={
            "warning_message": message,
            "when": "runtest",
            "nodeid": item.nodeid,
            "location": tuple(place) if isinstance(place, list) and len(place) == 3 else None,
        }
    )


def _category(name: Any) -> type[Warning]:
    """Return the class of a warning, where it is known here; importing what a guest names would run code that it chooses."""
    if isinstance(name, list) and len(name) == 2 and all(isinstance(part, str) for part in name):
        module = importlib.import_module("builtins") if name[0] == "builtins" else _loaded(name[0])
        found = getattr(module, name[1], None)
        if isinstance(found, type) and issubclass(found, Warning):
            return found
    return UserWarning


def _loaded(name: str) -> Any:
    import sys

    return sys.modules.get(name)

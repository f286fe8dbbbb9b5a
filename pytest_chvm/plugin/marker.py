"""What the marker `chvm` of a test says."""

from __future__ import annotations

from typing import Any, Literal

import pytest

# How long a test's guest is there: for this test, or for those of its module.
Inside = Literal["test", "module"]


def marker_arguments(item: pytest.Item) -> dict[str, Any]:
    """Return the arguments of a test's markers, `inside` among them, the closest one's before the others'."""
    marks = [mark.kwargs for mark in item.iter_markers("chvm")]
    return {key: value for kwargs in reversed(marks) for key, value in kwargs.items()}


def inside_of(item: pytest.Item) -> Inside | None:
    """Return whether a test runs in a guest."""
    given = marker_arguments(item).get("inside")
    return None if given is None or given is False else "module" if given == "module" else "test"

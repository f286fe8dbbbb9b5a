"""What the marker `chvm` of a test says."""

from __future__ import annotations

from typing import Any, Literal

import pytest

# How long a test's guest is there: for this test, or for those of its module.
Inside = Literal["test", "module"]
# Arguments that say something of the test, not of its VMs.
OF_KERNEL = {"kernel_config", "kernel_min"}
OF_TEST = {"inside", "allow_splats", *OF_KERNEL}


def marker_arguments(item: pytest.Item) -> dict[str, Any]:
    """Return the arguments of a test's markers, `inside` among them, the closest one's before the others'."""
    marks = [mark.kwargs for mark in item.iter_markers("chvm")]
    return {key: value for kwargs in reversed(marks) for key, value in kwargs.items()}


def vm_arguments(item: pytest.Item) -> dict[str, Any]:
    """Return those of a test's markers that are arguments of its VMs."""
    return {key: value for key, value in marker_arguments(item).items() if key not in OF_TEST}


def inside_of(item: pytest.Item) -> Inside | None:
    """Return whether a test runs in a guest."""
    given = marker_arguments(item).get("inside")
    return None if given is None or given is False else "module" if given == "module" else "test"

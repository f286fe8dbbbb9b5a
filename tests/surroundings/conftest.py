"""What these tests share: runs of pytest as a user makes them."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.runs import LIGHT

INNER_RUN_TIMEOUT_S = 60.0

RunPytest = Callable[..., pytest.RunResult]


@pytest.fixture
def run_pytest(pytester: pytest.Pytester, user_environment: pytest.MonkeyPatch) -> RunPytest:
    """Run pytest as a user does, in a process of its own."""

    def run(*arguments: str | os.PathLike[str]) -> pytest.RunResult:
        return pytester.runpytest_subprocess(*LIGHT, *arguments, timeout=INNER_RUN_TIMEOUT_S)

    return run

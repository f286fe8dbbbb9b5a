"""What the plugin's own tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_chvm.machine.guest_choice import choose_guest
from pytest_chvm.model import VmConfig
from pytest_chvm.settings import Settings
from tests.runs import LIGHT

INNER_RUN_TIMEOUT_S = 240.0

RunPytest = Callable[..., pytest.RunResult]


@pytest.fixture(scope="session")
def guest_kernel(guest_cache: Path) -> Path:
    """The built-in guest's kernel."""
    kernel = choose_guest(VmConfig(), Settings.resolve()).config.kernel
    assert kernel is not None
    return kernel


@pytest.fixture
def run_pytest(pytester: pytest.Pytester, user_environment: pytest.MonkeyPatch) -> RunPytest:
    """Run pytest as a user does, in a process of its own."""

    def run(*arguments: str | os.PathLike[str]) -> pytest.RunResult:
        return pytester.runpytest_subprocess(*LIGHT, *arguments, timeout=INNER_RUN_TIMEOUT_S)

    return run

"""What the plugin's own tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_chvm.machine.guest_choice import choose_guest
from pytest_chvm.model import VmConfig
from pytest_chvm.settings import Settings


@pytest.fixture(scope="session")
def guest_kernel(guest_cache: Path) -> Path:
    """The built-in guest's kernel."""
    kernel = choose_guest(VmConfig(), Settings.resolve()).config.kernel
    assert kernel is not None
    return kernel

"""Which of these tests run: with CHVM_CHAOS=full all, else those marked `quick`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.scene import Neighbourhood
from tests.runs import users_environment

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long ones to `make chaos` and `make soak`."""
    if os.environ.get("CHVM_CHAOS") == "full":
        return
    left_out = [item for item in items if HERE in item.path.parents and item.get_closest_marker("quick") is None]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def neighbourhood(guest_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neighbourhood]:
    """A sandbox in which others live, for runs that come to grief."""
    if os.geteuid() != 0:
        pytest.skip("what is beside the runs takes root to make")
    options = (f"--chvm-vmm={'cloud-hypervisor' if 'CHVM_CHAOS_IN_LAB' in os.environ else 'qemu'}",)
    with Neighbourhood(tmp_path_factory.mktemp("neighbourhood"), users_environment(guest_cache), options) as neighbourhood:
        yield neighbourhood

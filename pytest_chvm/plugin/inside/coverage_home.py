"""What coverage.py measures in a guest: a data file beside those of pytest-cov, which combines them, where there is one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pytest_chvm.base.untouched import random_hex


def options(config: pytest.Config) -> dict[str, Any] | None:
    """Return how coverage.py is to measure, as its arguments; None: not at all."""
    measuring = _measuring(config)
    if measuring is None:
        return None
    given = config.option
    file = measuring.config.config_file
    return {"source": given.cov_source, "branch": given.cov_branch, "config_file": os.path.abspath(file) if file else False}


def bring(config: pytest.Config, data: bytes | None) -> None:
    """Put a data file where pytest-cov finds it."""
    if data is not None and (measuring := _measuring(config)) is not None:
        own = Path(os.path.abspath(measuring.config.data_file))
        own.with_name(f"{own.name}.chvm-inside.{os.getpid()}.{random_hex(4)}").write_bytes(data)


def _measuring(config: pytest.Config) -> Any:
    """Return the `Coverage` that measures this process, where pytest-cov has started one."""
    controller = getattr(config.pluginmanager.get_plugin("_cov"), "cov_controller", None)
    return getattr(controller, "cov", None)

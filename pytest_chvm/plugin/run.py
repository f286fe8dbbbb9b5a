"""Which run, worker and process this is, and the beginning of its VMs."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pytest_chvm.plugin.keys import depth_key, level_key, pid_key, undo_key


def worker_input(config: pytest.Config) -> dict[str, Any]:
    """Return what the xdist controller has told this worker; nothing without one."""
    given: dict[str, Any] = getattr(config, "workerinput", {}).get("chvm", {})
    return given


def run_id(config: pytest.Config) -> str:
    """Return what the processes of this run have in common, and no other run has."""
    given: str | None = worker_input(config).get("run")
    if given:
        return given
    from pytest_chvm.host.keeper.remains import start_time_ticks

    pid, depth = config.stash[pid_key], config.stash[depth_key]
    return f"{pid}-{start_time_ticks(pid)}{f'-{depth}' if depth else ''}"


def worker_of(config: pytest.Config) -> str:
    """Return which of its run's processes this one is, `main` without xdist; a run within a test is not its test's."""
    worker: str = getattr(config, "workerinput", {}).get("workerid", "main")
    depth = config.stash[depth_key]
    return f"{worker}-within{depth}" if depth else worker


def enter_run(config: pytest.Config) -> None:
    """Have what is started from now on belong to this run; one within a test has a keeper of its own."""
    if level_key in config.stash:
        return
    from pytest_chvm.base.progress import show_progress_with
    from pytest_chvm.host.keeper.remains import boot_id
    from pytest_chvm.host.runs import Run, begin_run, end_run
    from pytest_chvm.model import ProcessIdentity

    given = worker_input(config)
    # A worker may be on another machine.
    here = given.get("boot_id") == boot_id()
    controller = ProcessIdentity(**given["controller"]) if here else None
    journal = Path(given["journal"]) if here and "journal" in given else None
    undo = config.stash[undo_key] = ExitStack()
    run = Run(run_id(config), worker_of(config), controller, journal)
    level = config.stash[level_key] = begin_run(run, within=config.stash[depth_key] > 0)
    undo.callback(end_run, level)
    if capture := config.pluginmanager.get_plugin("capturemanager"):
        undo.callback(show_progress_with, show_progress_with(capture.global_and_fixture_disabled))

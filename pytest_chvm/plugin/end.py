"""The end of a run: its keepers, and what is said of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from pytest_chvm.plugin.collection import choices
from pytest_chvm.plugin.keys import (
    controller_key,
    failures_key,
    pid_key,
    settings_key,
    sigterm_key,
    summed_up_key,
)
from pytest_chvm.plugin.run import end_host, host_so_far, run_id

if TYPE_CHECKING:
    from pytest_chvm.plugin.xdist import Controller


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what was started and that it is gone; under xdist, where the controller collects nothing, also what the VM tests got."""
    used = any(getattr(report, "chvm_used", False) for reports in terminalreporter.stats.values() for report in reports)
    if used and config.pluginmanager.hasplugin("dsession"):
        for line in choices(config.stash[settings_key]).splitlines():
            terminalreporter.write_line(line)
    if used:
        from pytest_chvm.plugin.splats import summary

        summary(terminalreporter)
    _say_what_is_left(config)


def _say_what_is_left(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    controller = config.stash.get(controller_key, None)
    # A forked child that goes on running pytest does not report on its parent's VMs.
    if reporter is None or summed_up_key in config.stash or config.stash.get(pid_key, None) != os.getpid():
        return
    if host_so_far(config) is not None or (controller and controller.journals):
        config.stash[summed_up_key] = True
        lines = _summary(config, controller)
        if lines and (reporter.stats.get("failed") or reporter.stats.get("error")):
            # The lines above may be a guest's.
            reporter.write_sep("-", "virtual machines")
        for line in lines:
            reporter.write_line(line)


def _summary(config: pytest.Config, controller: Controller | None) -> list[str]:
    from pytest_chvm.host import registry
    from pytest_chvm.host.runs import KINDS, Started
    from pytest_chvm.report.listing import run_summary

    host = host_so_far(config)
    started = (host.started if host else Started()).total(controller.journals if controller else ())
    failures = config.stash[failures_key] + (controller.failures if controller else [])
    left = list(dict.fromkeys([*failures, *registry.left_by(run_id(config))]))
    return run_summary({kind: started[kind] for kind in KINDS}, left) if started or left else []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the keeper process once the last fixture is gone, before the run's summary."""
    failures = _close_host(session.config)
    session.config.stash[failures_key] += failures
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["chvm_failures"] = failures


def _close_host(config: pytest.Config) -> list[str]:
    host = host_so_far(config)
    return host.close() if host else []


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the keeper process, if one is left, so that nothing outlives the run."""
    if pid_key not in config.stash:
        # Our `pytest_configure` did not run.
        return
    _close_host(config)
    # Pytest prints no summary after pytest.exit with a status of its own, which SIGTERM causes.
    _say_what_is_left(config)
    end_host(config)
    if (sigterm := config.stash.get(sigterm_key, None)) is not None:
        sigterm.let_go()

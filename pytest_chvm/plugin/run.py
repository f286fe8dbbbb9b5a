"""Which run, worker and process this is, and the host of its VMs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_chvm.plugin.keys import host_key, run_key

if TYPE_CHECKING:
    from pytest_chvm.base.progress import Progress
    from pytest_chvm.host.host import Host

# The configuration that the process's default host is for, where VMs are that a test launches without a fixture: the first one. A
# test can have a whole run within it (pytester's `runpytest_inprocess`), which has a host of its own.
_with_default_host: pytest.Config | None = None


def claim_default_host(config: pytest.Config) -> None:
    """Have the default host be this configuration's, if it is nobody's."""
    global _with_default_host
    if _with_default_host is None:
        _with_default_host = config


def worker_input(config: pytest.Config) -> dict[str, Any]:
    """Return what the xdist controller has told this worker; nothing without one."""
    given: dict[str, Any] = getattr(config, "workerinput", {}).get("chvm", {})
    return given


def run_id(config: pytest.Config) -> str:
    """Return the id that all processes of this run share."""
    given: str = worker_input(config).get("run", config.stash[run_key])
    return given


def worker_of(config: pytest.Config) -> str:
    """Return which of its run's processes this one is, `main` without xdist."""
    worker: str = getattr(config, "workerinput", {}).get("workerid", "main")
    return worker


def begin_host(config: pytest.Config) -> Host:
    """Return the host of this run's VMs; what is started from the first call on belongs to the run."""
    if (begun := config.stash.get(host_key, None)) is not None:
        return begun
    from pytest_chvm.host.host import Host, default_host
    from pytest_chvm.host.keeper.remains import boot_id
    from pytest_chvm.host.runs import Run
    from pytest_chvm.model import ProcessIdentity

    given = worker_input(config)
    # A worker may be on another machine.
    here = given.get("boot_id") == boot_id()
    controller = ProcessIdentity(**given["controller"]) if here else None
    journal = Path(given["journal"]) if here and "journal" in given else None
    host = config.stash[host_key] = default_host() if config is _with_default_host else Host()
    host.begin_run(Run(run_id(config), worker_of(config), controller, journal), _uncaptured(config))
    return host


def progress_of(config: pytest.Config) -> Progress:
    """Return what tells the person at the terminal what takes long; of use before there is a host."""
    from functools import partial

    from pytest_chvm.base.progress import show_progress

    return partial(show_progress, uncaptured=_uncaptured(config))


def _uncaptured(config: pytest.Config) -> Callable[[], AbstractContextManager[object]]:
    capture = config.pluginmanager.get_plugin("capturemanager")
    return capture.global_and_fixture_disabled if capture else nullcontext


def host_so_far(config: pytest.Config) -> Host | None:
    """Return the host of this run's VMs; None where none can have been started."""
    if (begun := config.stash.get(host_key, None)) is not None:
        return begun
    module = sys.modules.get("pytest_chvm.host.host")
    default: Host | None = module.default_host() if module and config is _with_default_host else None
    return default


def end_host(config: pytest.Config) -> None:
    """Have what is started from now on in this process, as by another run, not belong to this run."""
    global _with_default_host
    if (host := host_so_far(config)) is not None:
        host.end_run()
    if config is _with_default_host:
        _with_default_host = None

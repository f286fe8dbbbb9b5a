"""What is prepared once it is known that a run has VMs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_chvm.plugin.keys import controller_key, sigterm_key
from pytest_chvm.plugin.run import worker_input


def expect_vms(config: pytest.Config, session: pytest.Session | None = None) -> None:
    """Have SIGTERM be an orderly end from now on; `session` is that of a worker."""
    if sigterm_key not in config.stash:
        from pytest_chvm.plugin.sigterm import OrderlyEnd

        controller = config.stash.get(controller_key, None)
        is_worker = hasattr(config, "workerinput")
        workers = controller.workers if controller else {}
        config.stash[sigterm_key] = OrderlyEnd(session if is_worker else None, workers)
        if journal := worker_input(config).get("journal"):
            # A worker tells its xdist controller only the names of tests; this value reaches the controller too.
            Path(journal).write_text(f"{os.getpid()}\n")

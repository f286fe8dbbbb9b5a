"""SIGTERM to pytest as an orderly end of the run; part of the plugin, loaded where there are tests that use VMs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping

import pytest

from pytest_chvm.host.keeper.remains import start_time_ticks

# As a shell reports it; pytest's own statuses are below.
STATUS = 128 + signal.SIGTERM


class OrderlyEnd:
    """Turns SIGTERM into an orderly end of the run, where nobody else handles it, until `let_go`.

    `workers`: pid and start time of xdist's workers, which are told too. `session`: that of a worker.
    """

    def __init__(self, session: pytest.Session | None, workers: Mapping[int, int | None]) -> None:
        self._session = session
        self._workers = workers
        self._told = False
        self._masks = threading.local()
        self._mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if self._mine:
            signal.signal(signal.SIGTERM, self._end)
            os.register_at_fork(before=self._before_fork, after_in_parent=self._after_fork, after_in_child=self._in_child)

    def _before_fork(self) -> None:
        # Python forgets a signal that comes before the child has set itself up: held back, it comes after.
        self._masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM} if self._mine else set())

    def _after_fork(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.before)

    def _in_child(self) -> None:
        # It is to end as it would without this plugin.
        self.let_go()
        self._after_fork()

    def _end(self, number: int, _frame: object) -> None:
        if not self._told:
            # Once: another one would end the teardown that this one has begun.
            self._told = True
            for pid, started in self._workers.items():
                if start_time_ticks(pid) == started:
                    os.kill(pid, number)
            if self._session is not None:
                # Otherwise the controller would wait for the tests that this worker has not run.
                self._session.shouldstop = "SIGTERM"
            pytest.exit("SIGTERM", returncode=STATUS)

    def let_go(self) -> None:
        """Leave SIGTERM as it was, if nobody else has taken it meanwhile."""
        if self._mine and signal.getsignal(signal.SIGTERM) == self._end:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._mine = False

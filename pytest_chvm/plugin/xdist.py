"""Hooks of the xdist controller that look after its workers' VMs; registered where there are workers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_chvm.host.keeper.remains import boot_id, start_time_ticks

CRASHED_WORKER_TIMEOUT_S = 3.0


class Controller:
    """The hooks of xdist's. `expect_vms` is called when a worker has collected tests that use VMs.

    `workers`: pid and start time of each worker on this machine. `failures`: what could not be removed, in words.
    """

    def __init__(self, run: str, expect_vms: Callable[[], None]) -> None:
        self.run = run
        self.workers: dict[int, int | None] = {}
        self.failures: list[str] = []
        self._expect_vms = expect_vms
        self._journals: dict[str, Path] = {}

    @property
    def journals(self) -> list[Path]:
        """Of each worker that has VM tests, the file in which it writes down its pid and what it starts."""
        return [journal for journal in self._journals.values() if journal.exists()]

    def configure_node(self, node: Any) -> None:
        """Tell a worker whose end is the end of the run, and where to write down what it starts."""
        me = {"pid": os.getpid(), "start_time_ticks": start_time_ticks(os.getpid())}
        given = {"run": self.run, "boot_id": boot_id(), "controller": me}
        temporary = getattr(node.config, "_tmp_path_factory", None)
        if temporary is not None and node.gateway.spec.popen:
            worker = node.workerinput["workerid"]
            journal = self._journals[worker] = temporary.getbasetemp() / f"chvm-started-{worker}"
            given["journal"] = str(journal)
        node.workerinput["chvm"] = given

    def _has_vms(self, node: Any) -> bool:
        journal = self._journals.get(node.workerinput["workerid"])
        return journal is not None and journal.exists()

    def pytest_xdist_node_collection_finished(self, node: Any) -> None:
        """Prepare for VMs where a worker has collected tests that use them."""
        if self._has_vms(node):
            pid = int(self._journals[node.workerinput["workerid"]].read_text().split()[0])
            self.workers[pid] = start_time_ticks(pid)
            self._expect_vms()

    def pytest_testnodedown(self, node: Any, error: object | None) -> None:
        """Clean up after a worker that has crashed, at once."""
        self.failures += getattr(node, "workeroutput", {}).get("chvm_failures", [])
        if error and self._has_vms(node):
            from pytest_chvm.host.registry import clean_up_after_worker

            self.failures += clean_up_after_worker(self.run, node.workerinput["workerid"], CRASHED_WORKER_TIMEOUT_S)

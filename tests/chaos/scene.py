"""Where the events of the matrix happen: a sandbox with strangers in it, and one run among them that comes to grief."""

from __future__ import annotations

import json
import os
import platform
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pytest_chvm.base.deadline import Deadline
from pytest_chvm.host.keeper.remains import pidfd_ended, start_time_ticks
from pytest_chvm.host.virtiofsd import find_virtiofsd
from pytest_chvm.model import SharedDir
from tests.leaks import GONE_WITHIN_S, Sandbox, Snapshot
from tests.runs import PytestProcess

VICTIMS = Path(__file__).with_name("victims.py")
FOREIGN_LINKS = ("chvm0000000x", "chvmbr0000000")
FOREIGN_SOCKET = "/run/foreign.sock"
# In an emulated machine everything takes so many times as long.
PATIENCE = 6.0 if "CHVM_CHAOS_IN_LAB" in os.environ else 1.0
# A boot on a busy machine, and more.
NEWS_WITHIN_S = 60.0 * PATIENCE
# xdist ends a worker whose controller is gone after 10 s.
OWNERS_GONE_WITHIN_S = 15.0 * PATIENCE
EVERYTHING_GONE_WITHIN_S = GONE_WITHIN_S * PATIENCE


class Run(PytestProcess):
    """A run of the victims' project."""

    def __init__(
        self,
        sandbox: Sandbox,
        directory: Path,
        tests: Sequence[str],
        options: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        directory.mkdir()
        project = directory / "test_victims.py"
        shutil.copyfile(VICTIMS, project)
        for name in ("acted", "go"):
            os.mkfifo(directory / name)
        # Open all the time, so that nobody is waited for who is dead.
        self._fifos = {name: os.open(directory / name, os.O_RDWR | os.O_CLOEXEC) for name in ("acted", "go")}
        nodes = [f"{project}::{test}" for test in tests]
        super().__init__(sandbox, directory, *options, *nodes, f"--rootdir={directory}", environment=environment)
        self.told: list[dict[str, Any]] = []

    def release(self, name: str) -> None:
        """Let a test go on that waits for `acted`, or the bystander, which waits for `go`."""
        os.write(self._fifos[name], b"\n")

    def wait_told(self, test: str, what: str) -> dict[str, Any]:
        """Return the first piece of news of that kind from a test, that came or is to come."""
        while True:
            for news in self.told:
                if (news["test"], news["what"]) == (test, what):
                    return news
            self.told.append(json.loads(self.news(NEWS_WITHIN_S)))

    def next_told(self, timeout_s: float) -> dict[str, Any]:
        """Return the next piece of news."""
        self.told.append(json.loads(self.news(timeout_s)))
        return self.told[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End it, if it has not ended."""
        super().close()
        for fd in self._fifos.values():
            os.close(fd)


@dataclass
class Neighbourhood:
    """A sandbox with decoys: a QEMU and a virtiofsd of somebody else's, links named like ours, another run with a VM of its own."""

    directory: Path
    environment: dict[str, str]
    options: tuple[str, ...] = ()
    sandbox: Sandbox = field(default_factory=Sandbox)

    def __enter__(self) -> Self:
        self.sandbox.__enter__()
        self.sandbox.run("ip", "tuntap", "add", "dev", FOREIGN_LINKS[0], "mode", "tap")
        self.sandbox.run("ip", "link", "add", FOREIGN_LINKS[1], "type", "bridge")
        # The first namespace mounts the directory of names for all.
        self.sandbox.run("ip", "netns", "add", "first")
        self.sandbox.run("ip", "netns", "del", "first")
        virtiofsd = find_virtiofsd().command(SharedDir("foreign", Path("/mnt")), Path(FOREIGN_SOCKET))
        self._programs = [
            self._start(f"qemu-system-{platform.machine()}", "-machine", "none", "-nodefaults", "-display", "none", "-S"),
            self._start(*virtiofsd),
        ]
        started = time.monotonic()
        self._run = Run(self.sandbox, self.directory / "neighbour", ["test_neighbour"], self.options, self.environment)
        self._facts = self._run.wait_told("test_neighbour", "started")
        self._run.wait_told("test_neighbour", "ready")
        # How long a run takes here until its VM is ready.
        self.ready_after_s = time.monotonic() - started
        self.sandbox.take_for_granted()
        pids = [self._run.pid, self._facts["vmm"], *self._facts["sidecars"], *(program.pid for program in self._programs)]
        pids.append(self._facts["keeper"])
        self._alive = {pid: start_time_ticks(pid) for pid in pids}
        return self

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.sandbox.command(*command), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def harmed(self) -> list[str]:
        """Return what is no longer as it was of that which is nobody's business."""
        gone = [f"process {pid}" for pid, ticks in self._alive.items() if start_time_ticks(pid) != ticks]
        links = self.sandbox.links()
        gone += [f"link {name}" for name in (*FOREIGN_LINKS, *self._facts["taps"]) if name not in links]
        gone += [f"file {name}" for name in (FOREIGN_SOCKET, self._facts["run_dir"]) if not self.sandbox.path(name).exists()]
        return gone

    def tidy_up(self) -> None:
        """Have nothing that a failed test left count against the next."""
        for pid in self.sandbox.left_behind(timeout_s=0).pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.sandbox.left_behind()
        self.sandbox.take_for_granted()

    def __exit__(self, _type: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        try:
            self._run.release("go")
            status = self._run.wait(NEWS_WITHIN_S)
            assert status == 0 or error is not None, f"the neighbour's VM was harmed:\n{self._run.output}"
        finally:
            self._run.close()
            for program in self._programs:
                program.kill()
                program.wait()
            self.sandbox.__exit__(None, None, None)


@dataclass
class Scene:
    """One event: the run it befalls, and what that run's victim has."""

    neighbourhood: Neighbourhood
    directory: Path
    victim: dict[str, Any] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    @property
    def run(self) -> Run:
        """The run that it befalls: the first."""
        return self.runs[0]

    @contextmanager
    def start(self, *tests: str, options: Iterable[str] = (), environment: Mapping[str, str] | None = None) -> Iterator[Run]:
        """Start a run of tests of the victims' project; the first of the scene is its `run`."""
        surroundings = self.neighbourhood
        with Run(
            surroundings.sandbox,
            self.directory / f"{tests[0]}-{len(self.runs)}",
            tests,
            [*surroundings.options, *options],
            {**surroundings.environment, **(environment or {})},
        ) as run:
            self.runs.append(run)
            yield run

    @property
    def sandbox(self) -> Sandbox:
        """The namespaces."""
        return self.neighbourhood.sandbox

    def see_victim_go(self) -> None:
        """All that the victim had is gone 2 s after its process is, whatever the rest of the run does."""
        assert not wait_ended([self.victim["owner"]], OWNERS_GONE_WITHIN_S), f"it still runs; its run said:\n{self.run.output}"
        assert not wait_ended([self.victim["keeper"]], GONE_WITHIN_S), (
            f"the keeper is there {GONE_WITHIN_S} s after its owner's end"
        )
        left = [pid for pid in (self.victim["vmm"], *self.victim["sidecars"]) if start_time_ticks(pid) is not None]
        assert not left, f"still there: {left}"
        assert not set(self.victim["taps"]) & set(self.sandbox.links())
        assert not self.sandbox.path(self.victim["run_dir"]).exists()

    def left_behind(self, owners: Iterable[int] = ()) -> Snapshot:
        """Return what is there 2 s after the last process of the run has ended, but for children that the victim itself left.

        `owners` are processes of it beside those that have told something.
        """
        owners = {*owners, self.run.pid, *(news["owner"] for news in self.run.told)}
        assert not wait_ended(owners, OWNERS_GONE_WITHIN_S), f"it still runs; its run said:\n{self.run.output}"
        children = {news["child"] for news in self.run.told if "child" in news}
        return self.sandbox.left_behind(timeout_s=EVERYTHING_GONE_WITHIN_S, but=children)


def wait_ended(pids: Iterable[int], timeout_s: float) -> list[int]:
    """Wait for the ends of processes; returns those that are still there at the end of the time."""
    deadline = Deadline.after(timeout_s)
    living = []
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        if not pidfd_ended(pidfd, deadline.remaining_s):
            living.append(pid)
        os.close(pidfd)
    return living


def pause(seconds: float) -> None:
    """Let a moment pass that is the test's own choice, where there is no event to wait for."""
    select.select([], [], [], seconds)

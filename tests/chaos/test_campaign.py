"""A random signal for a random process of a run at a random moment, many times; a seed repeats it.

    make campaign N=200 SEED=...

Number 17 of a seed is the same process, signal and moment whatever the others are; what the run is doing just then
differs by a few milliseconds.
"""

from __future__ import annotations

import os
import random
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.scene import Neighbourhood, Scene, pause

KILLS = int(os.environ.get("CHVM_CHAOS_KILLS", "3"))
# As a part of `make test`, always the same.
SEED = os.environ.get("CHVM_CHAOS_SEED", "3")
SIGNALS = ("SIGKILL", "SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGABRT", "SIGSTOP")
SET_UPS = {"plain": (["test_a_life"], []), "n2": (["test_a_life", "test_another_life"], ["-n", "2"])}
# What a process is, by a part of its command line; the first that fits.
KINDS = {
    "keeper": "keeper.py",
    "vmm": "qemu-system",
    "virtiofsd": "virtiofsd",
    "worker": "exec(eval(sys.stdin",
    "pytest": "-m pytest",
}
LONGEST_RUN_S = 60.0
# How long a run takes in all, against the time until its VM is ready.
LIFE_TO_READY = 1.3


@dataclass(frozen=True)
class Kill:
    """What is done in a run: `moment` is a part of the time that a run takes."""

    set_up: str
    moment: float
    kind: str
    signal: str
    stopped_s: float
    which: float

    @classmethod
    def draw(cls, seed: str, number: int) -> Kill:
        """Return the kill of that number: a run without workers has none to be killed."""
        chance = random.Random(f"{seed}:{number}")
        set_up = chance.choice(list(SET_UPS))
        kinds = [kind for kind in KINDS if set_up == "n2" or kind != "worker"]
        return cls(set_up, chance.random(), chance.choice(kinds), chance.choice(SIGNALS), chance.uniform(0.1, 1.0), chance.random())


@pytest.mark.quick
@pytest.mark.parametrize("number", range(KILLS))
def test_nothing_is_left_after_kill(number: int, neighbourhood: Neighbourhood, tmp_path: Path) -> None:
    kill = Kill.draw(SEED, number)
    scene = Scene(neighbourhood, tmp_path)
    tests, options = SET_UPS[kill.set_up]
    again = f"{kill}\nto repeat it: make campaign SEED={SEED} N={number + 1} PYTEST_ARGS='-k kill[{number}]'"
    try:
        with scene.start(*tests, options=[*options, "--chvm-boot-timeout=8"]) as run:
            pause(kill.moment * neighbourhood.ready_after_s * LIFE_TO_READY)
            hit = strike(scene, kill)
            status = run.wait(LONGEST_RUN_S)
            left = scene.left_behind(hit.owners)
            again = f"{again}\n{hit}, status {status}; the run said:\n{run.output}"
            assert not left, f"left behind:\n{left}\n\nafter {again}"
            # xdist has errors of its own when a worker is killed while it starts.
            assert not re.search("^INTERNALERROR.*pytest_chvm", run.output, re.M), again
            assert neighbourhood.harmed() == [], again
    finally:
        neighbourhood.tidy_up()


@dataclass(frozen=True)
class Hit:
    """What was there at the moment, and which of it was hit."""

    pid: int | None
    what: str
    owners: tuple[int, ...]


def strike(scene: Scene, kill: Kill) -> Hit:
    """Send the signal to a process of the kind, or of the nearest one that is there."""
    there = {pid: kind for pid, command in scene.sandbox.processes().items() if (kind := kind_of(command))}
    owners = tuple(pid for pid, kind in there.items() if kind in ("pytest", "worker"))
    # Before there is a VM there is pytest, and after it there may be nothing.
    candidates = sorted(pid for pid, kind in there.items() if kind == kill.kind) or sorted(owners)
    if not candidates:
        return Hit(None, "nothing was there any more", owners)
    pid = candidates[int(kill.which * len(candidates))]
    hit = Hit(pid, there[pid], owners)
    number = signal.Signals[kill.signal]
    send(pid, [number])
    if number == signal.SIGSTOP and hit.what not in ("vmm", "virtiofsd"):
        # Whoever is stopped for ever does nothing wrong; one that was away for a while may.
        pause(kill.stopped_s)
        send(pid, [signal.SIGCONT])
    return hit


def kind_of(command: str) -> str | None:
    """Return what a process is for us."""
    return next((kind for kind, part in KINDS.items() if part in command), None)


def send(pid: int, numbers: Iterable[signal.Signals]) -> None:
    """Send signals to a process that may be gone."""
    for number in numbers:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return

"""Whatever befalls a run, nothing of it is there 2 s later, nothing of anybody else's is touched, and a person is told why."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.events import EVENTS, PLAIN, WORKERS, Event
from tests.chaos.scene import PATIENCE, Neighbourhood, Scene

# Above xdist's 10 s for workers that do not end, and a boot on a busy machine.
RUN_ENDS_WITHIN_S = 60.0 * PATIENCE

# Set by test_in_the_lab.py, for a machine where Cloud Hypervisor runs and that is nobody's.
IN_LAB = "CHVM_CHAOS_IN_LAB" in os.environ
CASES = [
    pytest.param(event, set_up, id=f"{event.name}-{set_up}", marks=[pytest.mark.quick] if set_up in event.quick else [])
    for event in EVENTS
    for set_up in event.set_ups
    # In the lab, those to which the VMM or the machine matters.
    if (event.of_the_vmm and set_up == PLAIN if IN_LAB else not event.in_lab_only)
]


@pytest.fixture
def scene(event: Event, set_up: str, neighbourhood: Neighbourhood, tmp_path: Path) -> Iterator[Scene]:
    """The run of the event's victim and a bystander: another test, of the other worker where there are two."""
    options = [*event.options, *(["-n", "2"] if set_up == WORKERS else [])]
    scene = Scene(neighbourhood, tmp_path)
    event.prepare(scene)
    try:
        with scene.start(event.victim, "test_bystander", options=options, environment=dict(event.environment)):
            scene.victim = scene.run.wait_told(event.victim, event.news)
            if set_up == WORKERS and event.news == "started":
                scene.run.wait_told("test_bystander", "started")
            yield scene
    finally:
        event.clean_up(scene)
        neighbourhood.tidy_up()


@pytest.mark.parametrize(("event", "set_up"), CASES)
def test_nothing_is_left_after(event: Event, set_up: str, scene: Scene) -> None:
    event.act(scene)
    scene.run.release("acted")
    if event.owner_dies:
        scene.see_victim_go()
    scene.run.release("go")
    status = scene.run.wait(RUN_ENDS_WITHIN_S)
    assert not scene.left_behind().pids
    event.clean_up(scene)
    left = scene.left_behind()
    said = scene.run.output
    assert not left, f"left behind:\n{left}\n\nthe run said:\n{said}"
    assert scene.neighbourhood.harmed() == []
    says = event.says if set_up == PLAIN or event.workers_say is None else event.workers_say
    assert re.search(says, said), f"no {says!r} in what the run said:\n{said}"
    assert set_up == WORKERS or event.status in (None, status), said


def test_there_are_enough_events() -> None:
    assert len(EVENTS) >= 25
    assert len({event.name for event in EVENTS}) == len(EVENTS)

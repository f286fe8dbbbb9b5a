"""A guest that writes whatever it likes to its consoles: the verdict, the report and the terminal stay ours."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.chaos.scene import Neighbourhood, Scene

LARGEST_OUTPUT = 200_000
LARGEST_GROWTH_KB = 48_000
# Of an emulated serial port: half a megabyte a second, less on a busy machine.
SECONDS_PER_MB = 8
# Text, ends of lines and tabs.
NOT_FOR_A_TERMINAL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize("megabytes", [pytest.param(1, marks=pytest.mark.quick), 100])
@pytest.mark.timeout(1200)
def test_a_hostile_guest_changes_no_verdict_and_reaches_no_terminal(
    megabytes: int, neighbourhood: Neighbourhood, tmp_path: Path
) -> None:
    report = tmp_path / "report.xml"
    scene = Scene(neighbourhood, tmp_path)
    options = ["-rA", "--timeout=1000", f"--junitxml={report}"]
    try:
        with scene.start("test_hostile_console", options=options, environment={"EVIL_MB": str(megabytes)}) as run:
            run.wait_told("test_hostile_console", "started")
            end = run.next_told(60 + megabytes * SECONDS_PER_MB)
            assert run.wait(60) == 1, run.output
            assert not scene.left_behind()
    finally:
        neighbourhood.tidy_up()
    assert end["log_mb"] >= megabytes - 1
    assert end["grown_kb"] < LARGEST_GROWTH_KB
    said = run.output_path.read_bytes()
    assert len(said) < LARGEST_OUTPUT
    text = said.decode()
    assert not NOT_FOR_A_TERMINAL.findall(text)
    assert re.search(r"^=+ 1 failed in ", text, re.M), text
    assert "AssertionError: on purpose" in text
    (suite,) = ElementTree.parse(report).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", "1", "0")
    assert len(report.read_bytes()) < LARGEST_OUTPUT

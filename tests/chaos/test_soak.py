"""Many VMs, one after the other, in one run: the last costs what the first did.

How long the last ones take is compared with the first ones of another run, which take turns with them: a machine may well be slower
than it was some minutes ago.

make soak N=300
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from tests.chaos.scene import Neighbourhood, Run, Scene

VMS = int(os.environ.get("CHVM_SOAK_VMS", "3"))
# Below that, a single slow boot decides.
VMS_FOR_TIMES = 100
PART = min(50, VMS // 2)
LONGEST_VM_S = 30.0
LARGEST_GROWTH = 1.05
LARGEST_SLOWDOWN = 1.15
COLUMNS = ("time_s", "descriptors", "threads", "rss_kb", "keeper_descriptors", "keeper_rss_kb")


@pytest.mark.quick
@pytest.mark.timeout(VMS * LONGEST_VM_S)
def test_the_last_vm_of_a_run_costs_what_the_first_did(
    neighbourhood: Neighbourhood, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = Scene(neighbourhood, tmp_path)
    try:
        with start(scene, VMS) as run:
            vms = [run.next_told(LONGEST_VM_S) for _ in range(VMS - PART)]
            with start(scene, PART) as fresh_run:
                fresh_vms = []
                for _ in range(PART):
                    for each, told in ((run, vms), (fresh_run, fresh_vms)):
                        each.release("go")
                        told.append(each.next_told(LONGEST_VM_S))
                for each in (run, fresh_run):
                    assert each.wait(LONGEST_VM_S) == 0, each.output
            assert not scene.left_behind()
    finally:
        neighbourhood.tidy_up()
    times_s = [mean(vm["time_s"] for vm in part) for part in (vms[:PART], vms[-PART:], fresh_vms)]
    with capsys.disabled():
        print(f"\n{table(vms)}")
        print("means of {} VMs: the first {:.3f} s, the last {:.3f} s, another run's first {:.3f} s".format(PART, *times_s))
    # Not the first itself, in which everything is imported.
    first, last = vms[1], vms[-1]
    for what in ("descriptors", "threads", "keeper_descriptors"):
        assert first[what] == last[what], what
    for what in ("rss_kb", "keeper_rss_kb"):
        assert last[what] < first[what] * LARGEST_GROWTH, what
    if VMS >= VMS_FOR_TIMES:
        assert times_s[1] < times_s[2] * LARGEST_SLOWDOWN


def start(scene: Scene, vms: int) -> AbstractContextManager[Run]:
    """Start a run of so many VMs, the last ones in turn; one so long is not told of each test."""
    return scene.start("test_soak", options=["-q"], environment={"SOAK_VMS": str(vms), "SOAK_IN_TURN": str(PART)})


def table(vms: Sequence[dict[str, Any]]) -> str:
    """Return what was measured, a row for every tenth part; times are means since the row before."""
    step = max(1, len(vms) // 10)
    rows = [f"{'VM':>5}" + "".join(f"{column:>20}" for column in COLUMNS)]
    for start in range(0, len(vms), step):
        part = vms[start : start + step]
        values = [f"{mean(vm['time_s'] for vm in part):.2f}", *(str(part[-1][column]) for column in COLUMNS[1:])]
        rows.append(f"{start + len(part):>5}" + "".join(f"{value:>20}" for value in values))
    return "\n".join(rows)

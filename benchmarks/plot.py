"""Draws what `benchmarks/clones.py` has measured: `python benchmarks/plot.py [build/clones.json] [docs/clones.svg]`."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

# What is shown, from above, with the words for it.
BARS = {
    "virtme-ng": "virtme-ng, `true`",
    "bare": "bare QEMU, bzImage, to its marker",
    "cold": "chvm_vm, booted, to ready",
    "clone answers": "chvm_vm, cloned, to its first answer",
    "clone": "chvm_vm, cloned, to ready",
    "teardown": "teardown",
}
COLOUR = "#4878a8"


def main(measured: Path, drawing: Path) -> None:
    """Draw the medians of each kind, and how a clone's time grows with its memory and with the clones alive."""
    import matplotlib as mpl

    # The same file for the same figures.
    mpl.rcParams["svg.hashsalt"] = "pytest-chvm"
    mpl.use("svg")
    from matplotlib import pyplot

    result = json.loads(measured.read_text())
    figure = pyplot.figure(figsize=(8, 6.5), layout="constrained")
    above, below = figure.subfigures(2, height_ratios=[4, 3])
    draw_kinds(above.subplots(), result["seconds"])
    by_size, by_alive = below.subplots(1, 2)
    draw_sizes(by_size, result["seconds"])
    draw_alive(by_alive, result["alive"].get("seconds", []))
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(drawing, metadata={"Date": None})


def draw_kinds(axes: Any, seconds: dict[str, list[float]]) -> None:
    """Draw one bar for each kind that was measured: the median, and a line from the lowest to the highest."""
    names = [name for name in reversed(BARS) if name in seconds]
    medians = [statistics.median(seconds[name]) * 1000 for name in names]
    spread = [[m - min(seconds[n]) * 1000 for n, m in zip(names, medians, strict=True)]]
    spread += [[max(seconds[n]) * 1000 - m for n, m in zip(names, medians, strict=True)]]
    bars = axes.barh([BARS[name] for name in names], medians, xerr=spread, color=COLOUR, ecolor="#222222")
    axes.bar_label(bars, [f"{median:.0f} ms" for median in medians], padding=8)
    axes.set_xlabel("ms: median, lowest to highest")
    axes.margins(x=0.12)


def draw_sizes(axes: Any, seconds: dict[str, list[float]]) -> None:
    """Draw the medians by the VM's memory, booted and cloned."""
    for kind, words, marker in (("cold", "booted, to ready", "s"), ("clone", "cloned, to its first answer", "o")):
        medians = {
            int(name.split()[2]): statistics.median(values) * 1000
            for name, values in seconds.items()
            if name.startswith(f"{kind} of ")
        }
        axes.plot([str(size_mb) for size_mb in medians], list(medians.values()), marker=marker, color=COLOUR, label=words)
    axes.set_xlabel("MiB of the VM")
    axes.set_ylabel("ms, median")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center right", frameon=False)


def draw_alive(axes: Any, seconds: list[float]) -> None:
    """Draw each clone's time to its first answer, by how many are alive with it."""
    axes.plot(range(1, len(seconds) + 1), [value * 1000 for value in seconds], ".", color=COLOUR)
    axes.set_xlabel("clones alive")
    axes.set_ylabel("ms to its first answer")
    axes.set_ylim(bottom=0)


if __name__ == "__main__":
    main(Path(*sys.argv[1:2] or ["build/clones.json"]), Path(*sys.argv[2:3] or ["docs/clones.svg"]))

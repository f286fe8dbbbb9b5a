"""Draws what `benchmarks/clones.py` has measured: `python benchmarks/plot.py [build/clones.json] [docs/clones.svg]`."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

# What is shown, from above, with the words for it.
BARS = {
    "virtme-ng": "virtme-ng, `true`",
    "bare": "bare QEMU, bzImage, to its marker",
    "cold": "chvm_vm, booted, to ready",
    "clone answers": "chvm_vm, cloned, to its first answer",
    "clone": "chvm_vm, cloned, to ready",
    "teardown": "teardown",
}


def main(measured: Path, drawing: Path) -> None:
    """Draw one bar for each kind that was measured: the median, and a line from the lowest to the highest."""
    import matplotlib as mpl

    # The same file for the same figures.
    mpl.rcParams["svg.hashsalt"] = "pytest-chvm"
    mpl.use("svg")
    from matplotlib import pyplot

    seconds = {name: values for name, values in json.loads(measured.read_text())["seconds"].items() if name in BARS}
    names = [name for name in reversed(BARS) if name in seconds]
    medians = [statistics.median(seconds[name]) * 1000 for name in names]
    spread = [[m - min(seconds[n]) * 1000 for n, m in zip(names, medians, strict=True)]]
    spread += [[max(seconds[n]) * 1000 - m for n, m in zip(names, medians, strict=True)]]
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(names) + 1), layout="constrained")
    bars = axes.barh([BARS[name] for name in names], medians, xerr=spread, color="#4878a8", ecolor="#222222")
    axes.bar_label(bars, [f"{median:.0f} ms" for median in medians], padding=8)
    axes.set_xlabel("ms: median, lowest to highest")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(drawing, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(*sys.argv[1:2] or ["build/clones.json"]), Path(*sys.argv[2:3] or ["docs/clones.svg"]))

"""What the keeper costs: its start, once per test process; a program started by it against one started directly; its memory.

python benchmarks/keeper.py [--rounds 20]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def resident_kb(pid: int) -> tuple[int, int]:
    """Return a process's resident memory, and its share of that (PSS), in KiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return found["Rss"], found["Pss"]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=20, metavar="N", help="keepers started, with five programs each (default: 20)"
    )
    rounds = parser.parse_args().rounds
    from pytest_chvm.host.host import Host
    from pytest_chvm.host.keeper import records

    milliseconds: dict[str, list[float]] = {"start": [], "program by the keeper": [], "program directly": [], "end": []}
    memory: list[tuple[int, int]] = []

    def measure(what: str, started: float) -> None:
        milliseconds[what].append((time.perf_counter() - started) * 1000)

    with tempfile.TemporaryDirectory() as directory:
        host = Host()
        log, program = Path(directory, "log"), ["sleep", "600"]
        for _round in range(rounds):
            started = time.perf_counter()
            keeper = host.keeper()
            measure("start", started)
            lease = keeper.directory / "1"
            lease.mkdir()
            for _number in range(5):
                started = time.perf_counter()
                keeper.spawn(program, log, lease)
                measure("program by the keeper", started)
                started = time.perf_counter()
                child = subprocess.Popen(program)
                measure("program directly", started)
                child.kill()
                child.wait()
            memory = [resident_kb(pid) for pid in records.read_pairs(str(keeper.directory / records.LOCK_FILE))]
            started = time.perf_counter()
            host.close()
            measure("end", started)
    for what, values in milliseconds.items():
        print(
            f"{what:<24}{statistics.median(values):7.2f} ms  lowest {min(values):.2f}  highest {max(values):.2f}  n {len(values)}"
        )
    print(f"memory of its processes  resident {' and '.join(f'{rss / 1024:.1f}' for rss, _ in memory)} MiB, "
          f"together {sum(pss for _, pss in memory) / 1024:.1f} MiB of their own and their part of what is shared")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

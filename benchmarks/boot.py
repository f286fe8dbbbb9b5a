"""How long a VM takes through the plugin, against the bare QEMU command and virtme-ng: one run, all of them in turn.

    python benchmarks/boot.py [--rounds 10] [--load] [--json build/boot.json]

The rounds are a pytest run of this very file, so that what is measured is the fixture a user has. In each:

    bare        `vm.handle.command`, the same VM without sockets for control, from its start to the marker on the serial file
    fixture     `chvm_vm(...)`, from the call to its return
    teardown    what the fixture's finalizer does with that VM, while it runs
    marker      another process writes the ready line to a serial file; from before that write to `wait_ready()` returning
    virtme-ng   `vng --disable-kvm --run KERNEL -- touch FILE` from its start to its end, where vng and kmod are installed

Then the plugin's cost for a run without VMs, `pytest` with it and with `-p no:chvm`, whole processes, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

MARKER = b"CHVM_READY"
TIMEOUT_S = 120.0
# What the project promises: the name of a figure, its limit and the unit.
LIMITS = {
    "fixture / bare": (1.05, ""),
    "marker to test going on": (10.0, "ms"),
    "teardown": (100.0, "ms"),
    "plugin without VMs": (15.0, "ms"),
}


@dataclass
class Measurements:
    """Seconds, by what was measured, in the order measured."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, what: str, seconds: float) -> None:
        """Take down one more."""
        self.seconds.setdefault(what, []).append(seconds)

    def median(self, what: str) -> float | None:
        """Return the median of what was measured, or None where it was not."""
        return statistics.median(self.seconds[what]) if self.seconds.get(what) else None


def write_result(file: Path, measured: Measurements, figures: Mapping[str, float], limits: Mapping[str, object]) -> None:
    """Write what was measured, and what was promised of it, as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    result = {"seconds": measured.seconds, "figures": figures, "limits": limits, "load_average": os.getloadavg()}
    file.write_text(json.dumps(result, indent=1) + "\n")


@dataclass
class Rounds:
    """The plugin that hands the options to the test below and takes its measurements back."""

    count: int
    vng: str | None
    measured: Measurements

    @pytest.fixture
    def rounds(self) -> Rounds:
        """What the test is to do."""
        return self


def test_boots(chvm_vm: Any, rounds: Rounds, tmp_path: Path) -> None:
    """Measure in turn, each round beginning with another one: what comes first has the colder caches."""
    # Not counted: builds the guest, starts the keeper and has everything in the page cache.
    first = chvm_vm(name="warm-up", boot="cold")
    first.close()
    kinds = [
        lambda: _fixture(chvm_vm, rounds.measured, tmp_path),
        lambda: _marker(chvm_vm, first.config, rounds.measured, tmp_path),
    ]
    if vng := rounds.vng:
        tree = _tree_with_index(tmp_path)
        try:
            _virtme_ng(vng, tree, Measurements())
            kinds.append(lambda: _virtme_ng(vng, tree, rounds.measured))
        except (subprocess.SubprocessError, FileNotFoundError) as error:
            print(f"without virtme-ng, which does not work here: {error}", file=sys.stderr)
    for number in range(rounds.count):
        for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
            kind()
        print(f"round {number + 1} of {rounds.count}", file=sys.stderr, flush=True)


def _fixture(chvm_vm: Any, measured: Measurements, directory: Path) -> None:
    """Boot through the fixture, end that VM, and boot the very same one bare."""
    started = time.perf_counter()
    vm = chvm_vm(name="boot", boot="cold")
    measured.add("fixture", time.perf_counter() - started)
    command = list(vm.handle.command)
    started = time.perf_counter()
    vm.close()
    measured.add("teardown", time.perf_counter() - started)
    measured.add("bare", _bare(command, directory / "bare.log"))


def _bare(command: list[str], log: Path, marker: bytes = MARKER, timeout_s: float = TIMEOUT_S) -> float:
    from pytest_chvm.base.deadline import Deadline
    from pytest_chvm.base.watch import FileWatch

    words = [f"file,id=serial,path={log}" if word.startswith("file,id=serial,path=") else word for word in command]
    log.write_bytes(b"")
    deadline = Deadline.after(timeout_s)
    with FileWatch(log) as watch:
        started = time.perf_counter()
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            while marker not in log.read_bytes():
                assert not watch.wait(deadline, process.pid), f"bare QEMU ended with status {process.wait()}"
                assert not deadline.expired, f"bare QEMU: no marker in {log} within {timeout_s:g} s"
            return time.perf_counter() - started
        finally:
            process.kill()
            process.wait()


WRITER = """
import os, sys, time
log, line = sys.argv[1:]
fd = os.open(log, os.O_WRONLY | os.O_APPEND)
print("ready", flush=True)
sys.stdin.readline()
# Long enough for the other side to be waiting, which is what is measured.
time.sleep(0.2)
now = time.monotonic()
os.write(fd, line.encode())
print(now, flush=True)
"""


def _marker(chvm_vm: Any, built_in: Any, measured: Measurements, directory: Path) -> None:
    """Have another process write the line that a VM is waited for; its guest never does."""
    log = directory / "marker.serial.log"
    vm = chvm_vm(
        name="marker", kernel=built_in.kernel, initramfs=built_in.initramfs, cmdline="console=ttyS0 quiet", networks=[],
        serial_log=log, ready_marker="BENCHMARK_READY", wait=False,
    )  # fmt: skip
    try:
        # Up, and quiet from here on.
        vm.wait_for_console(MARKER.decode())
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, log, "BENCHMARK_READY 192.0.2.1\n"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with writer:
            assert writer.stdin is not None
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            writer.stdin.write("go\n")
            writer.stdin.flush()
            vm.wait_ready()
            going_on = time.monotonic()
            measured.add("marker", going_on - float(writer.stdout.readline()))
    finally:
        vm.close()


def _tree_with_index(directory: Path) -> Path:
    """Copy the built-in guest's kernel and modules and index them, as virtme-ng wants them; returns the kernel's path there."""
    from pytest_chvm import Settings
    from pytest_chvm.machine.guest_choice import built_in_kernel

    kernel = built_in_kernel(Settings.resolve())
    assert kernel.modules_dir is not None
    shutil.copytree(kernel.modules_dir, directory / "lib/modules" / kernel.modules_dir.name, symlinks=True)
    (directory / "boot").mkdir()
    subprocess.run(["depmod", "-b", directory, kernel.modules_dir.name], check=True)
    return Path(shutil.copy(kernel.image, directory / "boot"))


def _virtme_ng(vng: str, kernel: Path, measured: Measurements) -> None:
    done = kernel.parent / "done"
    machine = ["--disable-kvm", "--memory", "256M", "--cpus", "1", "--run", str(kernel), "--rwdir", str(done.parent)]
    started = time.perf_counter()
    # Its exit status is lost where there is no udev in the guest, so that the file has to tell.
    command = [vng, *machine, "--", "touch", str(done)]
    said = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    measured.add("virtme-ng", time.perf_counter() - started)
    if not done.exists():
        raise subprocess.SubprocessError(
            f"{vng} has run no command: is its directory on PATH? It said: {(said.stderr or said.stdout)[-500:]}"
        )
    done.unlink()


def measure_plugin(count: int, measured: Measurements) -> None:
    """Run pytest on one test that uses no VM, with the plugin and without, in turn."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "test_nothing.py").write_text("def test_nothing(): pass\n")
        Path(directory, "pytest.ini").write_text("[pytest]\n")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        # Where bytecode may not be kept, every run compiles and what is measured is the compiler.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        ways = [("pytest with the plugin", []), ("pytest without", ["-p", "no:chvm"])]
        for number in range(count + 1):
            for what, words in ways[:: 1 if number % 2 else -1]:
                started = time.perf_counter()
                subprocess.run([*command, *words], cwd=directory, env=environment, stdout=subprocess.DEVNULL, check=True)
                # The first ones compile.
                if number:
                    measured.add(what, time.perf_counter() - started)


def boots_under_load(count: int, measured: Measurements) -> int:
    """Boot the default QEMU machine that many times beside three busy loops; returns how many became ready."""
    from pytest_chvm import BootFailedError, launch

    ready = 0
    with ExitStack() as stack:
        for loop in [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _number in range(3)]:
            stack.callback(loop.wait)
            stack.callback(loop.kill)
        for number in range(count):
            started = time.perf_counter()
            try:
                launch(vmm="qemu", boot="cold").close()
            except BootFailedError as error:
                print(f"boot {number + 1} under load: {error}", file=sys.stderr)
                continue
            ready += 1
            measured.add("under load", time.perf_counter() - started)
            print(f"boot {number + 1} of {count} under load", file=sys.stderr, flush=True)
    return ready


def report(measured: Measurements, loaded: tuple[int, int] | None) -> dict[str, Any]:
    """Print the tables; returns all of it for the JSON."""
    print(f"\n{'what':<26}{'median':>10}{'lowest':>10}{'highest':>10}{'n':>5}")
    for what, values in measured.seconds.items():
        cells = [statistics.median(values), min(values), max(values)]
        print(f"{what:<26}" + "".join(f"{cell * 1000:>7.1f} ms" for cell in cells) + f"{len(values):>5}")
    figures = _figures(measured)
    print(f"\n{'promise':<26}{'measured':>10}{'limit':>10}")
    for what, value in figures.items():
        limit, unit = LIMITS.get(what, (None, ""))
        verdict = "" if limit is None else f"{limit:g} {unit}".strip().rjust(10) + ("" if value <= limit else "  not kept")
        print(f"{what:<26}{f'{value:.3f}' if not unit else f'{value:.1f} {unit}':>10}{verdict}")
    if loaded:
        print(f"{'boots under load':<26}{f'{loaded[0]} of {loaded[1]}':>10}")
    return {
        "machine": {"kernel": platform.release(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "load_average": os.getloadavg(),
        "seconds": measured.seconds,
        "figures": figures,
        "boots_under_load": loaded,
    }


def _figures(measured: Measurements) -> dict[str, float]:
    figures = {}
    bare, fixture, virtme_ng = (measured.median(what) for what in ("bare", "fixture", "virtme-ng"))
    if bare and fixture:
        figures["fixture / bare"] = fixture / bare
    if fixture and virtme_ng:
        figures["virtme-ng / fixture"] = virtme_ng / fixture
    for what, name in (("marker", "marker to test going on"), ("teardown", "teardown")):
        if (median := measured.median(what)) is not None:
            figures[name] = median * 1000
    with_it, without = measured.median("pytest with the plugin"), measured.median("pytest without")
    if with_it and without:
        figures["plugin without VMs"] = (with_it - without) * 1000
    return figures


def main() -> int:
    """Measure, print, write the JSON; returns pytest's exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="boots of each kind (default: 10; 0: none)")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="pytest runs without VMs, of each kind (default: 20)")
    parser.add_argument(
        "--load", type=int, nargs="?", const=20, default=0, metavar="N", help="N boots (20) beside three busy loops"
    )
    parser.add_argument("--vng", default=shutil.which("vng"), metavar="PATH", help="virtme-ng (default: from PATH)")
    parser.add_argument("--json", type=Path, default=Path("build/boot.json"), metavar="PATH", help="default: build/boot.json")
    options = parser.parse_args()
    measured = Measurements()
    status = 0
    if options.rounds:
        vng = options.vng if shutil.which("modprobe") else None
        words = ["-q", "-s", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(Path(__file__).parent), __file__]
        status = int(pytest.main([*words, "--chvm-vmm=qemu"], plugins=[Rounds(options.rounds, vng, measured)]))
    if options.runs:
        measure_plugin(options.runs, measured)
    ready = boots_under_load(options.load, measured) if options.load else 0
    result = report(measured, (ready, options.load) if options.load else None)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    return status or int(ready < options.load)


if __name__ == "__main__":
    sys.exit(main())

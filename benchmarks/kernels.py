"""How long tests of kernels take: a matrix of them, a guest that writes much to its console, a module, and a boot.

    python benchmarks/kernels.py [--rounds 5] [--parts matrix console modules boot] [--kernel PACKAGE ...] [--tests 5]
                                 [--module nf_conntrack] [--before fe18b4a] [--json build/kernels.json]

In each round, in an order drawn anew:

    one kernel          `--tests` tests with a VM each that runs a command, with the first of the kernels, whose template is there
    four kernels        the same with all of them
    console watched     commands that write 1 MB of lines as the kernel's are to a guest's serial console, to the end of the last
    console unwatched   the same, and nobody looks at the console
    modprobe            `modprobe MODULE` in a clone, whose three dependencies it loads too
    boot now            `launch(boot="cold")` to ready, in a process of its own
    boot before         the same with the code of the commit `--before`

KERNEL is an image's package (`linux-image-...`), fetched at the first run. The modules part has the built-in guest's kernel.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import boot

from pytest_chvm import Settings, Vm, launch
from pytest_chvm.base.progress import show_progress
from pytest_chvm.guest.kernels.default import fetch_kernel_package
from pytest_chvm.machine.guest_choice import cache_dir
from pytest_chvm.machine.splats import SplatWatch

# What the project promises: the name of a figure and its limit, a ratio unless the unit says otherwise.
LIMITS = {
    "four kernels / 4 x one kernel": (1.3, ""),
    "console watched / unwatched": (1.05, ""),
    "modprobe": (150.0, "ms"),
    "boot now / before": (1.0, ""),
}
PARTS = ("matrix", "console", "modules", "boot")
KERNELS = (
    "linux-image-6.1.0-56-cloud-amd64",
    "linux-image-6.1.0-56-amd64",
    "linux-image-6.1.0-56-rt-amd64",
    "linux-image-6.12-cloud-amd64",
)
TESTS = """\
import pytest

@pytest.mark.parametrize("number", range({tests}))
def test_kernel(chvm_vm, number):
    assert chvm_vm().check_output("uname -s") == "Linux\\n"
"""
# As a kernel writes: what looks for splats has to look at each of them.
LINE = "[   12.345678] test: a line of a kernel's that has much to say of what it does all day long, but that is no splat\n"
CHAT_BYTES, CHAT_COMMANDS = 1_000_000, 5
BOOT = """\
import time
from pytest_chvm import launch
launch(vmm="qemu", boot="cold").close()
started = time.perf_counter()
with launch(vmm="qemu", boot="cold"):
    print(time.perf_counter() - started)
"""
TIMEOUT_S = 600.0
Kind = Callable[[], None]


def matrix_kinds(directory: Path, options: argparse.Namespace, measured: boot.Measurements) -> list[Kind]:
    """Return what runs tests with one kernel, and with all of them."""
    (directory / "test_matrix.py").write_text(TESTS.format(tests=options.tests))
    (directory / "pytest.ini").write_text("[pytest]\n")
    images = [kernel_image(package) for package in options.kernel]

    def run(what: str, chosen: list[Path]) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--chvm-vmm=qemu"]
        command += [f"--chvm-kernel={image}" for image in chosen]
        started = time.perf_counter()
        subprocess.run(command, cwd=directory, stdout=subprocess.DEVNULL, check=True, timeout=TIMEOUT_S)
        if what:
            measured.add(what, time.perf_counter() - started)

    # Not counted: it makes the templates.
    run("", images)
    return [lambda: run("one kernel", images[:1]), lambda: run("four kernels", images)]


def kernel_image(package: str) -> Path:
    """Return a package's kernel, fetched at the first call; not where the built-in guest's kernel is looked for."""
    tree = fetch_kernel_package(package, cache_dir(Settings.resolve()) / "newer", show_progress)
    (image,) = (tree / "boot").glob("vmlinuz-*")
    return image


def console_kinds(stack: ExitStack, measured: boot.Measurements) -> list[Kind]:
    """Return what has a guest write to its console, where that is watched and where it is not."""
    vm = stack.enter_context(launch(vmm="qemu", name="chatty"))
    vm.write_text("/root/chat", LINE * (CHAT_BYTES // CHAT_COMMANDS // len(LINE)))
    look = SplatWatch.look

    def chat(what: str, watched: Callable[[SplatWatch], None]) -> None:
        SplatWatch.look = watched  # type: ignore[assignment, method-assign]
        started = time.perf_counter()
        for _ in range(CHAT_COMMANDS):
            vm.run("cat /root/chat >/dev/ttyS0", timeout=TIMEOUT_S)
        measured.add(what, time.perf_counter() - started)
        SplatWatch.look = look  # type: ignore[method-assign]
        # What it has not seen yet is not the next one's.
        vm.run("true")

    return [lambda: chat("console watched", look), lambda: chat("console unwatched", lambda _watch: None)] * 3


def modules_kinds(module: str, measured: boot.Measurements) -> list[Kind]:
    """Return what loads a module in a clone."""

    def load(what: str) -> None:
        with launch(vmm="qemu", boot="clone") as vm:
            before = loaded(vm)
            started = time.perf_counter()
            vm.check_output(["modprobe", module])
            took_s = time.perf_counter() - started
            new = loaded(vm) - before
            assert len(new) >= 4, f"{module} brought only {new}"
            if what:
                measured.add(what, took_s)

    # Not counted: it makes the template.
    load("")
    return [functools.partial(load, "modprobe")] * 3


def loaded(vm: Vm) -> set[str]:
    """Return the names of the modules that a guest has loaded."""
    return set(vm.check_output("cut -d' ' -f1 /proc/modules").split())


def boot_kinds(directory: Path, commit: str, stack: ExitStack, measured: boot.Measurements) -> list[Kind]:
    """Return what boots the built-in guest, with the code as it is and with that of a commit."""
    here, then = Path(__file__).resolve().parents[1], directory / "before"
    subprocess.run(["git", "-C", here, "worktree", "add", "--detach", then, commit], check=True, capture_output=True)
    stack.callback(lambda: subprocess.run(["git", "-C", here, "worktree", "remove", "--force", then], check=True))

    def run(what: str, code: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": os.fspath(code)}
        command = [sys.executable, "-c", BOOT]
        done = subprocess.run(command, cwd=code, env=environment, stdout=subprocess.PIPE, check=True, timeout=TIMEOUT_S)
        measured.add(what, float(done.stdout))

    return [lambda: run("boot now", here), lambda: run("boot before", then)]


def rounds(options: argparse.Namespace, measured: boot.Measurements) -> None:
    """Measure each kind in each round, in an order drawn anew."""
    draw = random.Random(0)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        made: dict[str, Callable[[], list[Kind]]] = {
            "matrix": lambda: matrix_kinds(directory, options, measured),
            "console": lambda: console_kinds(stack, measured),
            "modules": lambda: modules_kinds(options.module, measured),
            "boot": lambda: boot_kinds(directory, options.before, stack, measured),
        }
        kinds = [kind for part in options.parts for kind in made[part]()]
        for number in range(options.rounds):
            # What a kind leaves behind (caches, memory to be cleared) must not always meet the same one.
            for kind in draw.sample(kinds, len(kinds)):
                kind()
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)


def figures(measured: boot.Measurements) -> dict[str, float]:
    """Return what the promises are about, by name."""
    found = {}
    median = measured.median
    if (four := median("four kernels")) and (one := median("one kernel")):
        found["four kernels / 4 x one kernel"] = four / (4 * one)
    if (watched := median("console watched")) and (unwatched := median("console unwatched")):
        found["console watched / unwatched"] = watched / unwatched
    if loaded := median("modprobe"):
        found["modprobe"] = loaded * 1000
    if (now := median("boot now")) and (before := median("boot before")):
        found["boot now / before"] = now / before
    return found


def report(measured: boot.Measurements, found: dict[str, float]) -> None:
    """Print both tables."""
    print(f"\n{'what':<34}{'median':>12}{'lowest':>12}{'highest':>12}{'n':>5}")
    for what, values in measured.seconds.items():
        cells = [statistics.median(values), min(values), max(values)]
        print(f"{what:<34}" + "".join(f"{cell * 1000:>9.1f} ms" for cell in cells) + f"{len(values):>5}")
    print(f"\n{'promise':<34}{'measured':>12}{'limit':>12}")
    for name, value in found.items():
        limit, unit = LIMITS[name]
        print(f"{name:<34}{f'{value:.3f} {unit}':>12}{f'{limit:g} {unit}':>12}{'' if value <= limit else '  not kept'}")


def main() -> int:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="some of it (default: all)")
    parser.add_argument("--kernel", nargs="+", default=KERNELS, metavar="PACKAGE", help=f"default: {' '.join(KERNELS)}")
    parser.add_argument("--tests", type=int, default=5, metavar="N", help="tests of the matrix, for each kernel (default: 5)")
    parser.add_argument("--module", default="nf_conntrack", help="one with three dependencies or more (default: nf_conntrack)")
    parser.add_argument("--before", default="fe18b4a", metavar="COMMIT", help="what boots are compared with (default: fe18b4a)")
    parser.add_argument("--json", type=Path, default=Path("build/kernels.json"), metavar="PATH", help="default: build/kernels.json")
    options = parser.parse_args()
    measured = boot.Measurements()
    rounds(options, measured)
    found = figures(measured)
    report(measured, found)
    boot.write_result(options.json, measured, found, LIMITS)
    return 0


if __name__ == "__main__":
    sys.exit(main())

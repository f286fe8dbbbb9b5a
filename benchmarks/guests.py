"""How long it takes to use guests as people have them: the host's own file system, a test inside, commands, files, a stock image.

    python benchmarks/guests.py [--rounds 5] [--parts python inside commands files stock image-clone]
                                [--image IMAGE] [--copy-mb 256] [--json build/guests.json]

In each round, in an order drawn anew:

    virtme-ng           `vng --disable-kvm --run KERNEL -- PYTHON -c LINE`, start to end, where vng and kmod are installed
    root=host cold      `launch(root="host", boot="cold")` to the output of the same line
    root=host clone     the same of a clone
    inside              a test that asserts nothing, with `inside=True`: from its start to the last of its reports
    bare channel        `true` over the console of an idle guest, by hand
    run                 the same by `vm.run`; and `run beside`, with a `popen` that prints ten lines a second
    put, get            a file of `--copy-mb` MiB into a guest's memory and out of it
    virtiofs in, out    the same by `cp` in the guest, from and to a shared dir; and `TCP in`, from a socket to the guest's `nc`
    stock cold          `launch(root_disk=IMAGE, boot="cold")` to ready
    stock bare          the QEMU command of that VM with the image's own kernel, initramfs and command line, to its login prompt
    image cold, clone   `launch(root_disk=IMAGE, user_data=...)` to its first command's output; three clones to one boot

IMAGE is for `stock` a Debian without cloud-init, which looks for its data source for minutes where nobody gives it one, and for the
last a Debian with it, as stock cloud images are; both are made at the first run.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import boot

from pytest_chvm import Settings, Vm, launch
from pytest_chvm.base.progress import show_progress
from pytest_chvm.base.untouched import random_hex
from pytest_chvm.guest.builders.debian import DebianRecipe, build_debian
from pytest_chvm.machine.guest_choice import cache_dir

# What the project promises: the name of a figure and its limit, all of them ratios.
LIMITS = {
    "root=host cold / virtme-ng": 0.8,
    "root=host clone / virtme-ng": 0.25,
    "inside / virtme-ng": 0.5,
    "run / bare channel": 1.2,
    "run beside / bare channel": 2.0,
    "put / fastest in": 2.0,
    "get / fastest out": 2.0,
    "stock cold / stock bare": 1.1,
    "image clone / image cold": 1 / 30,
}
LINE = "print('hello')"
SAID = "hello\n"
# Of the short ones, and of commands, in each round.
SHORT_REPEATED, COMMANDS = 3, 20
TICKS = "while :; do echo tick; usleep 100000; done"
PORT = 5001
TIMEOUT_S = 600.0
PARTS = ("python", "inside", "commands", "files", "stock", "image-clone")
Kind = Callable[[], None]
INSIDE = {
    "test_inside.py": "import pytest\n\n@pytest.mark.chvm(inside=True)\ndef test_nothing():\n    pass\n",
    "conftest.py": (
        "import os, time\n\n"
        "def pytest_runtest_logstart():\n"
        "    global last\n"
        "    last = time.monotonic()\n\n"
        # A report's own duration is what the guest measured: the boot is none of it.
        "def pytest_runtest_logreport(report):\n"
        "    global last\n"
        "    before, last = last, time.monotonic()\n"
        "    with open(os.environ['DURATIONS'], 'a') as file:\n"
        "        print(report.outcome, last - before, file=file)\n"
    ),
    "pytest.ini": "[pytest]\n",
}


def host_root(how: str, measured: boot.Measurements) -> None:
    """Run a line of Python in a guest with the host's file system."""
    started = time.perf_counter()
    with launch(vmm="qemu", root="host", boot=how) as vm:
        assert vm.check_output([sys.executable, "-c", LINE]) == SAID
        measured.add(f"root=host {how}", time.perf_counter() - started)


def virtme_ng(vng: str, kernel: Path, measured: boot.Measurements) -> None:
    """Run the same line with virtme-ng."""
    said = kernel.parent / "said"
    machine = ["--disable-kvm", "--memory", "256M", "--cpus", "1", "--run", str(kernel), "--rwdir", str(said.parent)]
    started = time.perf_counter()
    # What it prints is lost where there is no udev in the guest.
    command = [vng, *machine, "--", f'{sys.executable} -c "{LINE}" >{said}']
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    measured.add("virtme-ng", time.perf_counter() - started)
    assert said.exists(), f"it has run no command: {(done.stderr or done.stdout)[-500:]}"
    assert said.read_text() == SAID
    said.unlink()


def inside(directory: Path, measured: boot.Measurements) -> None:
    """Run pytest on a test that runs inside."""
    durations = directory / "durations"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--chvm-vmm=qemu", str(directory)]
    subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, "DURATIONS": str(durations)},
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=TIMEOUT_S,
    )
    reports = [line.split() for line in durations.read_text().splitlines()]
    assert {outcome for outcome, _seconds in reports} == {"passed"}
    measured.add("inside", sum(float(seconds) for _outcome, seconds in reports))
    durations.unlink()


def round_trips(vm: Vm, draw: random.Random, measured: boot.Measurements) -> None:
    """Have an idle guest run the smallest command, in each way."""
    ways: list[Kind] = [
        lambda: bare_channel(vm, measured),
        lambda: run(vm, "run", measured),
        lambda: run_beside(vm, measured),
    ]
    for way in draw.sample(ways, len(ways)):
        way()


def bare_channel(vm: Vm, measured: boot.Measurements) -> None:
    """Say the line that has the guest's shell run a command, and wait for its end."""
    machine = vm.machine
    # It connects again with the next command.
    machine.channel.close()
    fd = machine.driver.open_console(machine.handle)
    try:
        for _ in range(COMMANDS):
            token = random_hex(16)
            end, answer = f"\n{token} end 0\n".encode(), b""
            started = time.perf_counter()
            os.write(fd, f"run {token} true\n".encode())
            while end not in answer:
                assert select.select([fd], [], [], TIMEOUT_S)[0], "the guest's shell does not answer"
                answer += os.read(fd, 1 << 16)
            measured.add("bare channel", time.perf_counter() - started)
    finally:
        os.close(fd)


def run(vm: Vm, what: str, measured: boot.Measurements) -> None:
    """Run the command by `vm.run`; the first one connects, which is not counted."""
    vm.run("true")
    for _ in range(COMMANDS):
        started = time.perf_counter()
        assert vm.run("true").returncode == 0
        measured.add(what, time.perf_counter() - started)


def run_beside(vm: Vm, measured: boot.Measurements) -> None:
    """Run the command while a process prints."""
    with vm.popen(TICKS) as ticking:
        assert next(ticking.stdout) == "tick\n"
        reader = threading.Thread(target=list, args=(ticking.stdout,))
        reader.start()
        run(vm, "run beside", measured)
        ticking.kill()
        reader.join()


def copies(vm: Vm, shared: Path, draw: random.Random, measured: boot.Measurements) -> None:
    """Copy a file into a guest's memory and out of it, in each way."""
    file = shared / "file"

    def timed(what: str, copy: Callable[[], object], result: Callable[[], object]) -> None:
        started = time.perf_counter()
        copy()
        measured.add(what, time.perf_counter() - started)
        assert result() == file.stat().st_size, f"{what}: it was not copied whole"

    def in_guest() -> int:
        size = int(vm.check_output("stat -c %s /tmp/in"))
        vm.check_output("mv /tmp/in /tmp/there")
        return size

    def out() -> int:
        size = (shared / "out").stat().st_size
        (shared / "out").unlink()
        return size

    ways = [
        lambda: timed("put", lambda: vm.put(file, "/tmp/in"), in_guest),
        lambda: timed("virtiofs in", lambda: vm.check_output("cp /mnt/files/file /tmp/in", timeout=TIMEOUT_S), in_guest),
        lambda: timed("TCP in", lambda: send(vm, file), in_guest),
    ]
    for way in draw.sample(ways, len(ways)):
        way()
    ways = [
        lambda: timed("get", lambda: vm.get("/tmp/there", shared / "out"), out),
        lambda: timed("virtiofs out", lambda: vm.check_output("cp /tmp/there /mnt/files/out", timeout=TIMEOUT_S), out),
    ]
    for way in draw.sample(ways, len(ways)):
        way()


def send(vm: Vm, file: Path) -> None:
    """Send a file to the guest's `nc`."""
    with vm.popen(f"nc -l -p {PORT} >/tmp/in") as receiving:
        vm.check_output(f"until netstat -ltn | grep -q :{PORT}; do usleep 10000; done")
        with socket.create_connection(vm.address(PORT), TIMEOUT_S) as connection, file.open("rb") as data:
            connection.sendfile(data)
        assert receiving.wait(TIMEOUT_S) == 0


class Stock:
    """A stock image, booted by `launch` and by hand."""

    def __init__(self, image: Path, directory: Path) -> None:
        self.image, self.directory = image, directory
        with launch(vmm="qemu", boot="cold", **self._arguments()) as vm:
            release = vm.check_output("uname -r").strip()
            for name in ("vmlinuz", "initrd.img"):
                vm.get(f"/boot/{name}-{release}", directory / name)
            cmdline = f"root=UUID={vm.check_output('findmnt -no UUID /').strip()} ro console=ttyS0 quiet loglevel=5"
            command = list(vm.handle.command)
        for option, value in (("-kernel", "vmlinuz"), ("-initrd", "initrd.img"), ("-append", cmdline)):
            place = command.index(option) + 1
            command[place] = value if option == "-append" else str(directory / value)
        disk = command.index("-blockdev") + 1
        command[disk] = command[disk].rpartition("file.filename=")[0] + f"file.filename={directory}/disk.qcow2"
        self.command = command

    def _arguments(self) -> dict[str, object]:
        return {"root_disk": self.image, "memory_mb": 512, "network": "none", "boot_timeout": TIMEOUT_S}

    def cold(self, measured: boot.Measurements) -> None:
        """Boot it as a test does."""
        started = time.perf_counter()
        with launch(vmm="qemu", boot="cold", **self._arguments()):
            measured.add("stock cold", time.perf_counter() - started)

    def bare(self, measured: boot.Measurements) -> None:
        """Boot it as somebody would by hand."""
        disk = self.directory / "disk.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", self.image, disk], check=True)
        measured.add("stock bare", boot._bare(self.command, self.directory / "bare.log", b" login: ", TIMEOUT_S))
        disk.unlink()


def rounds(options: argparse.Namespace, measured: boot.Measurements) -> None:
    """Measure each kind in each round, in an order drawn anew."""
    draw = random.Random(0)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        made = {
            "python": lambda place: python_kinds(place, options.vng, measured),
            "inside": lambda place: inside_kinds(place, measured),
            "commands": lambda _place: command_kinds(stack, draw, measured),
            "files": lambda place: file_kinds(place, options.copy_mb, stack, draw, measured),
            "stock": lambda place: stock_kinds(place, options.image, measured),
            "image-clone": lambda _place: image_kinds(options.image, measured),
        }
        kinds = []
        for part in options.parts:
            place = directory / part
            place.mkdir()
            kinds += made[part](place)
        for number in range(options.rounds):
            # What a kind leaves behind (caches, memory to be cleared) must not always meet the same one.
            for kind in draw.sample(kinds, len(kinds)):
                kind()
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)


def python_kinds(directory: Path, vng: str | None, measured: boot.Measurements) -> list[Kind]:
    """Return what runs a line of Python in a guest."""
    # Not counted: it makes the template.
    host_root("clone", boot.Measurements())
    kinds: list[Kind] = [lambda: host_root("cold", measured)] + [lambda: host_root("clone", measured)] * SHORT_REPEATED
    if vng and shutil.which("modprobe"):
        kernel = boot._tree_with_index(directory)
        kinds.append(lambda: virtme_ng(vng, kernel, measured))
    return kinds


def inside_kinds(directory: Path, measured: boot.Measurements) -> list[Kind]:
    """Return what runs a test inside."""
    for name, text in INSIDE.items():
        (directory / name).write_text(text)
    # Not counted: it makes the template.
    inside(directory, boot.Measurements())
    return [lambda: inside(directory, measured)] * SHORT_REPEATED


def command_kinds(stack: ExitStack, draw: random.Random, measured: boot.Measurements) -> list[Kind]:
    """Return what has an idle guest run commands."""
    vm = stack.enter_context(launch(vmm="qemu", name="idle"))
    return [lambda: round_trips(vm, draw, measured)]


def file_kinds(directory: Path, size_mb: int, stack: ExitStack, draw: random.Random, measured: boot.Measurements) -> list[Kind]:
    """Return what copies a file into a guest and out of it."""
    (directory / "file").write_bytes(os.urandom(size_mb << 20))
    vm = stack.enter_context(launch(vmm="qemu", name="full", shared_dirs={"files": directory}, memory_mb=4 * size_mb + 256))
    return [lambda: copies(vm, directory, draw, measured)]


def stock_kinds(directory: Path, image: Path | None, measured: boot.Measurements) -> list[Kind]:
    """Return what boots a stock image."""
    stock = Stock(image or plain_debian(), directory)
    return [lambda: stock.cold(measured), lambda: stock.bare(measured)]


def image_kinds(image: Path | None, measured: boot.Measurements) -> list[Kind]:
    """Return what boots a stock image with cloud-init, and what clones it."""
    image = image or build_debian(DebianRecipe(), cache_dir(Settings.resolve()), show_progress)
    # Not counted: it makes the template.
    image_vm(image, "clone", boot.Measurements())
    return [lambda: image_vm(image, "cold", measured)] + [lambda: image_vm(image, "clone", measured)] * SHORT_REPEATED


def image_vm(image: Path, how: str, measured: boot.Measurements) -> None:
    """Have a VM of a stock image run its first command, cloud-init through."""
    more: dict[str, object] = {"user_data": {"hostname": "told"}, "memory_mb": 512, "boot_timeout": TIMEOUT_S}
    started = time.perf_counter()
    with launch(vmm="qemu", boot=how, root_disk=image, **more) as vm:
        said = vm.check_output("cat /run/cloud-init/result.json")
        measured.add(f"image {how}", time.perf_counter() - started)
    assert "DataSourceNoCloud" in said


def plain_debian() -> Path:
    """Return the stock image, made at the first call."""
    return build_debian(DebianRecipe(without=("cloud-init",)), cache_dir(Settings.resolve()), show_progress)


def figures(measured: boot.Measurements) -> dict[str, float]:
    """Return the ratios that are promised, of what was measured."""
    medians = {what: statistics.median(values) for what, values in measured.seconds.items()}
    if "put" in medians:
        medians["fastest in"] = min(medians["virtiofs in"], medians["TCP in"])
        medians["fastest out"] = medians["virtiofs out"]
    parts = {name: name.split(" / ") for name in LIMITS}
    return {name: medians[one] / medians[other] for name, (one, other) in parts.items() if {one, other} <= medians.keys()}


def report(measured: boot.Measurements, found: dict[str, float]) -> None:
    """Print both tables."""
    print(f"\n{'what':<30}{'median':>12}{'lowest':>12}{'highest':>12}{'n':>5}")
    for what, values in sorted(measured.seconds.items()):
        cells = [statistics.median(values), min(values), max(values)]
        print(f"{what:<30}" + "".join(f"{cell * 1000:>9.1f} ms" for cell in cells) + f"{len(values):>5}")
    print(f"\n{'promise':<30}{'measured':>12}{'limit':>12}")
    for name, value in found.items():
        print(f"{name:<30}{value:>12.3f}{LIMITS[name]:>12g}{'' if value <= LIMITS[name] else '  not kept'}")


def main() -> int:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="some of it (default: all)")
    parser.add_argument("--image", type=Path, metavar="PATH", help="a stock image, qcow2 (default: Debian; see above)")
    parser.add_argument("--copy-mb", type=int, default=256, metavar="N", help="size of the file that is copied (default: 256)")
    parser.add_argument("--vng", default=shutil.which("vng"), metavar="PATH", help="virtme-ng (default: from PATH)")
    parser.add_argument("--json", type=Path, default=Path("build/guests.json"), metavar="PATH", help="default: build/guests.json")
    options = parser.parse_args()
    measured = boot.Measurements()
    rounds(options, measured)
    found = figures(measured)
    report(measured, found)
    boot.write_result(options.json, measured, found, LIMITS)
    return 0


if __name__ == "__main__":
    sys.exit(main())

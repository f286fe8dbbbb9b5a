"""How long a clone takes, against booting, in one run.

    python benchmarks/clones.py [--vmm qemu] [--rounds 10] [--alive 40] [--suite 100] [--json build/clones.json]

In each round, in an order drawn anew, the short ones three times:

    bare            the QEMU command of a VM with the distribution's bzImage, from its start to the marker on the serial file
    virtme-ng       `vng --disable-kvm --run KERNEL -- touch FILE` from its start to its end, where vng and kmod are installed
    cold            `chvm_vm(boot="cold")` to ready
    clone           `chvm_vm(boot="clone")` to ready, on a TAP
    clone answers   the same, to the answer of its first command
    floor           what QEMU and the guest need for that: its own start, one QMP session, the renewal line, the first command, over
                    plain sockets
    clock           by how much that clone's clock is off, at most
    teardown        the end of that clone

Then clones and boots of 128 to 2048 MiB, `--alive` clones at once (time of each, memory of 1, 10 and all of them), and a suite of
`--suite` tests with a VM each that runs one command: cold and cloned, with `-n 1` and `-n 2`. `--vmm cloud-hypervisor` is for
inside the lab: cold and clone only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import boot

from pytest_chvm import Settings, Vm, launch
from pytest_chvm.base.deadline import Deadline
from pytest_chvm.base.watch import FileWatch
from pytest_chvm.guest import renew, renewal
from pytest_chvm.machine.guest_choice import built_in_kernel

# What the project promises: the name of a figure and its limit, a ratio unless the unit says otherwise.
LIMITS = {
    "clone answers / bare": (1 / 8, ""),
    "clone answers / virtme-ng": (1 / 15, ""),
    "cold / bare": (0.85, ""),
    "clone answers / cold (Cloud Hypervisor)": (1 / 3, ""),
    "clone answers - floor": (30.0, "ms"),
    "clock": (50.0, "ms"),
    "2048 MiB / 128 MiB": (1.2, ""),
    "last alive / first": (1.5, ""),
    "private memory of one": (90.0, "MiB"),
    "private memory of one (Cloud Hypervisor)": (30.0, "MiB"),
    "suite -n 2, clones / cold": (1 / 5, ""),
    "suite of clones, -n 1 / -n 2": (1.4, ""),
}
SIZES_MB = (128, 256, 512, 1024, 2048)
SHORT_REPEATED = 3


def rounds(count: int, vmm: str, vng: str | None, measured: boot.Measurements) -> None:
    """Measure each kind in each round, in an order drawn anew."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        launch(vmm=vmm, boot="clone").close()
        kinds = [lambda: clone(vmm, measured)] * SHORT_REPEATED + [lambda: measured.add("cold", cold(vmm))]
        if vmm == "qemu":
            command = stock_command()
            kinds.append(lambda: measured.add("bare", boot._bare(command, directory / "bare.log")))
            floor = Floor(directory)
            kinds += [lambda: measured.add("floor", floor.measure())] * SHORT_REPEATED
        if vng is not None:
            tree = boot._tree_with_index(directory)
            kinds.append(lambda: boot._virtme_ng(vng, tree, measured))
        # Drawn, not in turn: what a kind leaves behind (caches, memory to be cleared) must not always meet the same one.
        draw = random.Random(0)
        for number in range(count):
            for kind in draw.sample(kinds, len(kinds)):
                kind()
            print(f"round {number + 1} of {count}", file=sys.stderr, flush=True)


def clone(vmm: str, measured: boot.Measurements, **arguments: Any) -> float:
    """Start a clone and have it run a command; returns the seconds until the answer."""
    started = time.perf_counter()
    vm = launch(vmm=vmm, boot="clone", **arguments)
    ready = time.perf_counter()
    vm.check_output("true")
    answered = time.perf_counter()
    if not arguments:
        measured.add("clock", clock_error_s(vm))
    ending = time.perf_counter()
    vm.close()
    if not arguments:
        measured.add("clone", ready - started)
        measured.add("clone answers", answered - started)
        measured.add("teardown", time.perf_counter() - ending)
    return answered - started


def clock_error_s(vm: Vm) -> float:
    """Return by how many seconds a guest's clock is off at most: it says the time between two looks at ours, five times."""
    off = []
    for _ in range(5):
        before = time.time()
        seconds, microseconds = re.findall(r"tv_u?sec: +(\d+)", vm.check_output("adjtimex"))
        guest = int(seconds) + int(microseconds) / 1e6
        off.append((guest - time.time(), guest - before))
    return max(-max(least for least, _ in off), min(most for _, most in off))


def cold(vmm: str, **arguments: Any) -> float:
    """Boot a VM; returns the seconds until it is ready."""
    started = time.perf_counter()
    with launch(vmm=vmm, boot="cold", **arguments):
        return time.perf_counter() - started


def stock_command() -> list[str]:
    """Return the QEMU command of a VM with the kernel as the distribution packs it."""
    with launch(vmm="qemu", boot="cold", network="none", kernel=built_in_kernel(Settings.resolve()).image) as vm:
        return list(vm.handle.command)


class Floor:
    """A clone started by hand, from the same template, with nothing of the plugin's in between."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with launch(vmm="qemu", boot="clone") as vm:
            assert vm.origin.saved is not None
            self.state = vm.origin.saved / "state"
            self.words = [word for word in (vm.config.cmdline or "").split() if word.startswith("chvm.")]
            log, tap = vm.serial_log, vm.handle.taps[0]
            command = [word.replace(str(log), f"{directory}/floor.log").replace(tap, "chvmfloor") for word in vm.handle.command]
        for name in ("qmp", "console"):
            command += ["-chardev", f"socket,id={name},path={directory}/{name}.sock,server=on,wait=off"]
        command += [
            "-incoming",
            "defer",
            "-S",
            "-mon",
            "chardev=qmp,mode=control",
            "-device",
            "virtio-serial-pci",
            "-device",
            "virtconsole,chardev=console",
        ]
        self.command = command

    def measure(self) -> float:
        """Return the seconds from the start of QEMU to the first command's answer."""
        log = self.directory / "floor.log"
        log.write_bytes(b"")
        subprocess.run(["ip", "tuntap", "add", "chvmfloor", "mode", "tap"], check=True)
        subprocess.run(["ip", "link", "set", "chvmfloor", "up"], check=True)
        try:
            started = time.perf_counter()
            with ExitStack() as stack:
                process = stack.enter_context(subprocess.Popen(self.command, stdin=subprocess.DEVNULL))
                stack.callback(process.kill)
                self._load(stack)
                console = self._connected(stack, "console")
                call = renew.call("0" * renew.TOKEN_SIZE)
                console.sendall(call)
                answer = b""
                while call not in answer:
                    answer += console.recv(4096)
                console.sendall(renewal.message() + f"do - {renewal.line(self.words)}\n".encode())
                with FileWatch(log) as watch:
                    while boot.MARKER not in log.read_bytes():
                        watch.wait(Deadline.after(boot.TIMEOUT_S), process.pid)
                console.sendall(b"run floor true\n")
                answer = b""
                while b"\nfloor end 0\n" not in answer:
                    answer += console.recv(4096)
                return time.perf_counter() - started
        finally:
            subprocess.run(["ip", "link", "del", "chvmfloor"], check=True)

    def _load(self, stack: ExitStack) -> None:
        qmp = self._connected(stack, "qmp")
        answers = qmp.makefile("rb")
        answers.readline()

        def execute(command: str, fds: Sequence[int] = (), **arguments: Any) -> None:
            packet = json.dumps({"execute": command, "arguments": arguments}).encode()
            socket.send_fds(qmp, [packet], list(fds))
            while "return" not in (answer := json.loads(answers.readline())):
                assert "error" not in answer, answer

        execute("qmp_capabilities")
        states = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
        execute("migrate-set-capabilities", capabilities=states)
        with self.state.open("rb") as state:
            execute("getfd", [state.fileno()], fdname="state")
            execute("migrate-incoming", uri="fd:state")
            while json.loads(answers.readline()).get("data", {}).get("status") != "completed":
                continue
        execute("cont")

    def _connected(self, stack: ExitStack, name: str) -> socket.socket:
        peer = stack.enter_context(socket.socket(socket.AF_UNIX))
        deadline = Deadline.after(boot.TIMEOUT_S)
        while True:
            try:
                peer.connect(f"{self.directory}/{name}.sock")
                return peer
            except (FileNotFoundError, ConnectionRefusedError):
                assert not deadline.expired
                time.sleep(0.0005)


def sizes(count: int, vmm: str, measured: boot.Measurements) -> None:
    """Measure clones and boots of several sizes in turn."""
    for size_mb in SIZES_MB:
        launch(vmm=vmm, boot="clone", memory_mb=size_mb).close()
    for _ in range(count):
        for size_mb in SIZES_MB:
            measured.add(f"clone of {size_mb} MiB", clone(vmm, measured, memory_mb=size_mb))
            measured.add(f"cold of {size_mb} MiB", cold(vmm, memory_mb=size_mb))


def alive(count: int, vmm: str) -> dict[str, Any]:
    """Start clones that stay; returns the seconds of each, and what one has for itself and all have together, in MiB.

    The memory is by how many were alive: one, ten, all.
    """
    seconds: list[float] = []
    memory_mb: dict[int, dict[str, float]] = {}
    with ExitStack() as stack:
        vms: list[Vm] = []
        for number in range(1, count + 1):
            started = time.perf_counter()
            vms.append(stack.enter_context(launch(vmm=vmm, boot="clone", name=f"alive{number}")))
            vms[-1].check_output("true")
            seconds.append(time.perf_counter() - started)
            if number in {1, 10, count}:
                used = [used_mb(vm.pid) for vm in vms]
                memory_mb[number] = {
                    "private": statistics.median(private for private, _ in used),
                    "together": sum(part for _, part in used),
                }
    return {"seconds": seconds, "memory_mb": memory_mb}


def used_mb(pid: int) -> tuple[float, float]:
    """Return the memory that is a process's alone, and that with its part of what is shared, in MiB (smaps_rollup, proc(5))."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    sizes_kb = {words[0]: int(words[1]) for line in lines[1:] if (words := line.split())}
    return (sizes_kb["Private_Clean:"] + sizes_kb["Private_Dirty:"]) / 1024, sizes_kb["Pss:"] / 1024


def suite(count: int, vmm: str) -> dict[str, float]:
    """Run tests with a VM of its own each: cold and cloned, with one worker and with two; returns seconds."""
    seconds = {}
    with tempfile.TemporaryDirectory() as name:
        source = "import pytest\n\n@pytest.mark.parametrize('number', range({}))\ndef test_vm(chvm_vm, number):\n    {}\n"
        Path(name, "test_suite.py").write_text(source.format(count, "assert chvm_vm().check_output('echo on') == 'on\\n'"))
        for kind in ("cold", "clone"):
            for workers in (1, 2):
                words = ["-q", f"-n{workers}", f"--chvm-boot={kind}", f"--chvm-vmm={vmm}", "-p", "no:cacheprovider"]
                started = time.perf_counter()
                subprocess.run([sys.executable, "-m", "pytest", *words], cwd=name, stdout=subprocess.DEVNULL, check=True)
                seconds[f"{kind} -n{workers}"] = time.perf_counter() - started
                print(f"suite of {count}, {kind}, {workers} workers: {seconds[f'{kind} -n{workers}']:.1f} s", file=sys.stderr)
    return seconds


def figures(vmm: str, measured: boot.Measurements, living: dict[str, Any], suites: dict[str, float]) -> dict[str, float]:
    """Return what the promises are about, by name."""
    found = {}
    other_vmm = " (Cloud Hypervisor)" if vmm != "qemu" else ""
    median = measured.median
    answers = median("clone answers")
    for what in ("bare", "virtme-ng"):
        if answers and (other := median(what)):
            found[f"clone answers / {what}"] = answers / other
    booted, bare, floor = median("cold"), median("bare"), median("floor")
    if booted and bare:
        found["cold / bare"] = booted / bare
    if answers and booted:
        found["clone answers / cold" + other_vmm] = answers / booted
    if answers and floor:
        found["clone answers - floor"] = (answers - floor) * 1000
    if off := median("clock"):
        found["clock"] = off * 1000
    smallest, largest = median(f"clone of {SIZES_MB[0]} MiB"), median(f"clone of {SIZES_MB[-1]} MiB")
    if smallest and largest:
        found["2048 MiB / 128 MiB"] = largest / smallest
    if living:
        # One alone says nothing on a machine with other work.
        found["last alive / first"] = statistics.median(living["seconds"][-5:]) / statistics.median(living["seconds"][:5])
        last = max(living["memory_mb"])
        found["private memory of one" + other_vmm] = living["memory_mb"][last]["private"]
    if suites:
        found["suite -n 2, clones / cold"] = suites["clone -n2"] / suites["cold -n2"]
        found["suite of clones, -n 1 / -n 2"] = suites["clone -n1"] / suites["clone -n2"]
    return found


def report(found: dict[str, float], measured: boot.Measurements, memory_mb: dict[int, dict[str, float]]) -> None:
    """Print the tables."""
    print(f"\n{'what':<34}{'median':>10}{'lowest':>10}{'highest':>10}{'n':>5}")
    for what, values in measured.seconds.items():
        cells = [statistics.median(values), min(values), max(values)]
        print(f"{what:<34}" + "".join(f"{cell * 1000:>7.1f} ms" for cell in cells) + f"{len(values):>5}")
    for number, used in memory_mb.items():
        print(f"{number} alive: {used['private']:.1f} MiB private each, {used['together']:.0f} MiB together")
    print(f"\n{'promise':<42}{'measured':>12}{'limit':>14}")
    for what, value in found.items():
        limit, unit = LIMITS.get(what, (None, ""))
        kept = limit is None or (value >= limit if what == "suite of clones, -n 1 / -n 2" else value <= limit)
        shown = "" if limit is None else f"{limit:.3f} {unit}".strip() if not unit else f"{limit:g} {unit}"
        print(f"{what:<42}{f'{value:.3f} {unit}'.strip():>12}{shown:>14}{'' if kept else '  not kept'}")


def main() -> int:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vmm", default="qemu", choices=("qemu", "cloud-hypervisor"))
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="default: 10")
    parser.add_argument("--alive", type=int, default=40, metavar="N", help="clones at once (default: 40; 0: none)")
    parser.add_argument("--suite", type=int, default=100, metavar="N", help="tests of the suite (default: 100; 0: none)")
    parser.add_argument("--vng", default=shutil.which("vng"), metavar="PATH", help="virtme-ng (default: from PATH)")
    parser.add_argument("--json", type=Path, default=Path("build/clones.json"), metavar="PATH", help="default: build/clones.json")
    options = parser.parse_args()
    measured = boot.Measurements()
    vng = options.vng if options.vmm == "qemu" and shutil.which("modprobe") else None
    rounds(options.rounds, options.vmm, vng, measured)
    if options.vmm == "qemu":
        sizes(options.rounds, options.vmm, measured)
    living = alive(options.alive, options.vmm) if options.alive else {}
    suites = suite(options.suite, options.vmm) if options.suite else {}
    found = figures(options.vmm, measured, living, suites)
    report(found, measured, living.get("memory_mb", {}))
    result = {"seconds": measured.seconds, "alive": living, "suite_s": suites, "figures": found, "load_average": os.getloadavg()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the plugin adds to Cloud Hypervisor, in one run, all in turn.

Where there is no KVM, in the lab:

    chvm lab -- python benchmarks/cloud_hypervisor.py [--rounds 7]

    fixture / bare   `launch(...)` to ready over `vm.handle.command`, the same VM without sockets for control, to the marker
    stop             `vm.stop()` of a guest that is up, less what the bare command needs from SIGTERM to its end

and, without a VM and not in the lab (`--api`): one API call against a peer that answers at once, less a bare round trip.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from pytest_chvm import launch
from pytest_chvm.base.deadline import Deadline
from pytest_chvm.base.watch import FileWatch
from pytest_chvm.drivers.cloud_hypervisor import api as ch_api

TIMEOUT_S = 120.0
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def bare(command: tuple[str, ...], log: Path) -> tuple[float, float]:
    """Return seconds from the command's start to the marker, and from SIGTERM to its end."""
    log.write_bytes(b"")
    deadline = Deadline.after(TIMEOUT_S)
    with FileWatch(log) as watch:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while b"CHVM_READY" not in log.read_bytes():
            if watch.wait(deadline, process.pid) or deadline.expired:
                raise SystemExit(f"the bare command did not get to the marker: {log.read_text(errors='replace')[-500:]}")
        ready_s = time.perf_counter() - started
    started = time.perf_counter()
    process.terminate()
    process.wait(TIMEOUT_S)
    return ready_s, time.perf_counter() - started


def boots(rounds: int) -> None:
    """Print both boots' and both ends' medians."""
    seconds: dict[str, list[float]] = {"fixture": [], "bare": [], "stop": [], "bare end": []}
    with tempfile.TemporaryDirectory() as place:
        log = Path(place, "serial.log")
        # The first of each warms caches and imports.
        for number in range(rounds + 1):
            started = time.perf_counter()
            vm = launch(vmm="cloud-hypervisor", boot="cold", network="none", serial_log=log)
            taken = {"fixture": time.perf_counter() - started}
            started = time.perf_counter()
            vm.stop()
            taken["stop"] = time.perf_counter() - started
            taken["bare"], taken["bare end"] = bare(vm.handle.command, log)
            for what, value in taken.items() if number else ():
                seconds[what].append(value)
    median = {what: statistics.median(values) for what, values in seconds.items()}
    for what, value in median.items():
        print(f"{what:16} {value * 1000:8.0f} ms   {min(seconds[what]) * 1000:.0f} to {max(seconds[what]) * 1000:.0f}")
    print(f"fixture / bare   {median['fixture'] / median['bare']:8.3f}      at most 1.15")
    print(f"stop - bare end  {(median['stop'] - median['bare end']) * 1000:8.0f} ms   under 300")


def api(calls: int) -> None:
    """Print what one API call costs over a bare round trip."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "api.sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.fspath(path))
        listener.listen()

        def serve() -> None:
            while True:
                client, _ = listener.accept()
                with client:
                    client.recv(65536)
                    client.sendall(ANSWER)

        threading.Thread(target=serve, daemon=True).start()
        taken: dict[str, list[float]] = {"call": [], "bare": []}
        for number in range(calls + 1):
            started = time.perf_counter()
            ch_api.call("benchmark", path, "vm.info", ask=True)
            call_s = time.perf_counter() - started
            started = time.perf_counter()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(os.fspath(path))
                client.sendall(b"GET /api/v1/vm.info HTTP/1.1\r\nHost: localhost\r\n\r\n")
                while client.recv(65536):
                    continue
            if number:
                taken["call"].append(call_s)
                taken["bare"].append(time.perf_counter() - started)
    over_ms = (statistics.median(taken["call"]) - statistics.median(taken["bare"])) * 1000
    print(f"API call - bare  {over_ms:8.2f} ms   under 2")


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="boots of each kind (default: 7)")
    parser.add_argument("--api", action="store_true", help="the API call instead of boots")
    options = parser.parse_args()
    if options.api:
        api(200)
    else:
        boots(options.rounds)


if __name__ == "__main__":
    main()

"""`chvm ps`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    ps = commands.add_parser("ps", help="list the VMs of your test runs", description="List the VMs of your test runs.")
    ps.add_argument("--json", action="store_true", help="print a JSON array")
    ps.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from pytest_chvm.report.listing import duration, table
    from pytest_chvm.report.running import running_vms

    vms, problems = running_vms()
    for problem in problems:
        sys.stderr.write(f"chvm: {problem}\n")
    if options.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(vm) for vm in vms], indent=1) + "\n")
        return 0
    heads = ("VM", "STATE", "TEST", "WORKER", "AGE", "MIB", "IP", "VMM", "PID", "CONSOLE")
    rows = [
        [vm.name, vm.state, vm.test, vm.worker, duration(vm.age_s), vm.memory_mb, vm.ip, vm.vmm, vm.pid, vm.console] for vm in vms
    ]
    sys.stdout.write(table(heads, [["-" if cell is None else str(cell) for cell in row] for row in rows]) if rows else "no VMs\n")
    return 0

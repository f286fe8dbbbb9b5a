"""The `chvm` command: every subcommand parses its arguments and calls one function that tests call too."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from pytest_chvm.settings import count, seconds

if TYPE_CHECKING:
    from pytest_chvm.snapshots import TemplateStore

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="chvm", description="Virtual machines for tests.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_lab(commands)
    _add_templates(commands)
    _add_ps(commands)
    _add_reap(commands)
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    from pytest_chvm.errors import VmError

    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except VmError as error:
        sys.stderr.write(f"chvm: {error}\n")
        return 125
    return status


def _end(number: int, _frame: FrameType | None) -> None:
    # As an exception, so that everything is given back on the way out.
    sys.exit(128 + number)


def _add_lab(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    lab = commands.add_parser(
        "lab",
        help="run a command where KVM works: in a machine made of software that sees this one's files",
        description="Run a command, or a shell, in a machine with KVM made of software. It sees this machine's files; what is "
        "written to them is thrown away, but for the directories named with --rw. Where KVM works, the command is run directly.",
        epilog="Exit status: the command's; 124 after --timeout, 125 where the lab failed, 126 and 127 for a command that cannot "
        "be run or is not there, 128 + N for one ended by signal N.",
    )
    lab.add_argument("--memory-mb", type=_argument(count), default=2048, metavar="N", help="its memory in MiB (default: 2048)")
    lab.add_argument("--rw", type=Path, action="append", default=[], metavar="DIR", help="keep what is written to DIR; repeatable")
    lab.add_argument("--timeout", type=_argument(seconds), metavar="SECONDS", help="end everything after so long")
    lab.add_argument("--kernel", type=Path, metavar="PATH", help="its kernel (default: the built-in guest's)")
    lab.add_argument("--force", action="store_true", help="use the lab even where KVM works")
    lab.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="what to run (default: a shell)")
    lab.set_defaults(run=_run_lab)


def _run_lab(options: argparse.Namespace) -> int:
    from pytest_chvm import lab

    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    return lab.run(
        words,
        memory_mb=options.memory_mb,
        writable=options.rw,
        timeout=options.timeout,
        kernel=options.kernel,
        force=options.force,
    )


def _add_templates(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    templates = commands.add_parser(
        "templates",
        help="the saved VMs that clones start from",
        description="List or remove the saved VMs that clones start from. They are made when they are needed, and removed when "
        "they take too much of the disk: those used longest ago first, never one in use.",
    )
    actions = templates.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="show them, the one used last first")
    listing.add_argument("--check", action="store_true", help="read all of each, and say whether it is as it was written")
    listing.add_argument("--json", action="store_true", help="as a JSON array")
    listing.set_defaults(run=_list_templates)
    prune = actions.add_parser("prune", help="remove those used longest ago")
    prune.add_argument("--keep-mb", type=int, default=0, metavar="N", help="until the rest takes N MiB (default: 0: remove all)")
    prune.set_defaults(run=_prune_templates)


def _template_store() -> TemplateStore:
    from pytest_chvm.guest_choice import cache_dir
    from pytest_chvm.settings import Settings
    from pytest_chvm.snapshots import TemplateStore

    return TemplateStore(cache_dir(Settings.resolve()))


def _list_templates(options: argparse.Namespace) -> int:
    from pytest_chvm.snapshots import describe

    templates = []
    for template in _template_store().all():
        # Another process may remove it just now.
        with suppress(FileNotFoundError):
            templates.append(describe(template, wholly=options.check))
    if options.json:
        _say(json.dumps(templates, indent=2))
        return 0
    for row in templates:
        state = "" if row["intact"] else "  damaged: it is made anew when it is needed"
        _say(f"{row['key'][:12]}  {row['size_mb']:5} MiB  used {row['last_used']}  {row['what']}{state}")
    return 0


def _prune_templates(options: argparse.Namespace) -> int:
    for template in _template_store().prune(options.keep_mb):
        _say(f"removed {template.key[:12]}")
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _add_ps(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    ps = commands.add_parser("ps", help="list the VMs of your test runs", description="List the VMs of your test runs.")
    ps.add_argument("--json", action="store_true", help="print a JSON array")
    ps.set_defaults(run=_run_ps)


def _run_ps(options: argparse.Namespace) -> int:
    from pytest_chvm.host.registry import running_vms
    from pytest_chvm.report.listing import duration, table

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


def _add_reap(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    reap = commands.add_parser(
        "reap",
        help="remove what killed test runs left",
        description="Remove what test runs of yours left that were killed together with what cleans up after them. What "
        "belongs to a living run is left alone. The next run does the same by itself.",
        epilog="Exit status: 1 where something could not be removed or understood.",
    )
    reap.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    reap.add_argument("--json", action="store_true", help="print a JSON object with the arrays 'removed' and 'failures'")
    reap.set_defaults(run=_run_reap)


def _run_reap(options: argparse.Namespace) -> int:
    from pytest_chvm.host.registry import reap

    removed, failures = reap(dry_run=options.dry_run)
    if options.json:
        sys.stdout.write(json.dumps({"removed": removed, "failures": failures}, indent=1) + "\n")
        return int(bool(failures))
    done = "would remove" if options.dry_run else "removed"
    sys.stdout.write("".join(f"{done} {what}\n" for what in removed) or "nothing to remove\n")
    sys.stderr.write("".join(f"chvm: {failure}\n" for failure in failures))
    return int(bool(failures))


def _argument(convert: Callable[[str], T]) -> Callable[[str], T]:
    """Return a converter of the options' as one of argparse's, which shows the text of its own error only."""

    def converted(text: str) -> T:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error

    return converted


if __name__ == "__main__":
    # For `python -m pytest_chvm.cli`, where the console script is not on PATH.
    sys.exit(main())

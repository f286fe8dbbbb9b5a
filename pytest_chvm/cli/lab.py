"""`chvm lab`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pytest_chvm.cli.arguments import argument
from pytest_chvm.settings import count, seconds


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    lab = commands.add_parser(
        "lab",
        help="run a command where KVM works: in a machine made of software that sees this one's files",
        description="Run a command, or a shell, in a machine with KVM made of software. It sees this machine's files; what is "
        "written to them is thrown away, but for the directories named with --rw. Where KVM works, the command is run directly.",
        epilog="Exit status: the command's; 124 after --timeout, 125 where the lab failed, 126 and 127 for a command that cannot "
        "be run or is not there, 128 + N for one ended by signal N.",
    )
    lab.add_argument("--memory-mb", type=argument(count), default=2048, metavar="N", help="its memory in MiB (default: 2048)")
    lab.add_argument("--rw", type=Path, action="append", default=[], metavar="DIR", help="keep what is written to DIR; repeatable")
    lab.add_argument("--timeout", type=argument(seconds), metavar="SECONDS", help="end everything after so long")
    lab.add_argument("--kernel", type=Path, metavar="PATH", help="its kernel (default: the built-in guest's)")
    lab.add_argument("--force", action="store_true", help="use the lab even where KVM works")
    lab.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="what to run (default: a shell)")
    lab.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
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

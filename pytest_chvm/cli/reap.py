"""`chvm reap`."""

from __future__ import annotations

import argparse
import json
import sys


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    reap = commands.add_parser(
        "reap",
        help="remove what killed test runs left",
        description="Remove what test runs of yours left that were killed together with what cleans up after them. What "
        "belongs to a living run is left alone. The next run does the same by itself.",
        epilog="Exit status: 1 where something could not be removed or understood.",
    )
    reap.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    reap.add_argument("--json", action="store_true", help="print a JSON object with the arrays 'removed' and 'failures'")
    reap.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from pytest_chvm.host.registry import reap

    removed, failures = reap(dry_run=options.dry_run)
    if options.json:
        sys.stdout.write(json.dumps({"removed": removed, "failures": failures}, indent=1) + "\n")
        return int(bool(failures))
    done = "would remove" if options.dry_run else "removed"
    sys.stdout.write("".join(f"{done} {what}\n" for what in removed) or "nothing to remove\n")
    sys.stderr.write("".join(f"chvm: {failure}\n" for failure in failures))
    return int(bool(failures))

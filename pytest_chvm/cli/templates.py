"""`chvm templates`."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_chvm.clones.store import TemplateStore


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
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
    listing.set_defaults(run=_list)
    prune = actions.add_parser("prune", help="remove those used longest ago")
    prune.add_argument("--keep-mb", type=int, default=0, metavar="N", help="until the rest takes N MiB (default: 0: remove all)")
    prune.set_defaults(run=_prune)


def _store() -> TemplateStore:
    from pytest_chvm.clones.store import TemplateStore
    from pytest_chvm.machine.guest_choice import cache_dir
    from pytest_chvm.settings import Settings

    return TemplateStore(cache_dir(Settings.resolve()))


def _list(options: argparse.Namespace) -> int:
    from pytest_chvm.clones.store import describe

    templates = []
    for template in _store().all():
        # Another process may remove it just now.
        with suppress(FileNotFoundError):
            templates.append(describe(template, wholly=options.check))
    if options.json:
        sys.stdout.write(json.dumps(templates, indent=2) + "\n")
        return 0
    for row in templates:
        state = "" if row["intact"] else "  damaged: it is made anew when it is needed"
        sys.stdout.write(f"{row['key'][:12]}  {row['size_mb']:5} MiB  used {row['last_used']}  {row['what']}{state}\n")
    return 0


def _prune(options: argparse.Namespace) -> int:
    for template in _store().prune(options.keep_mb):
        sys.stdout.write(f"removed {template.key[:12]}\n")
    return 0

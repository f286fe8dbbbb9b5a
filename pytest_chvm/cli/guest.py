"""`chvm guest`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pytest_chvm.cli.arguments import argument
from pytest_chvm.settings import count


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    guest = commands.add_parser("guest", help="guests to boot", description="Make disk images for root_disk=.")
    actions = guest.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="make a disk image of a distribution, without root")
    distributions = build.add_subparsers(dest="distribution", required=True, metavar="DISTRIBUTION")
    debian = distributions.add_parser(
        "debian",
        help="Debian with systemd, cloud-init and an SSH server",
        description="Make a disk image of Debian with mmdebstrap and print where it is: systemd, a kernel for VMs, cloud-init and "
        "an SSH server, on a disk that boots by UEFI too. What was built once is kept in the cache.",
    )
    debian.add_argument("--suite", default="bookworm", metavar="NAME", help="bookworm (the default) or a later one")
    debian.add_argument("--packages", type=_names, default=(), metavar="A,B", help="what else is installed")
    debian.add_argument("--without", type=_names, default=(), metavar="A,B", help="what is not: cloud-init, openssh-server, ...")
    debian.add_argument("--size-mb", type=argument(count), default=2048, metavar="N", help="its size in MiB (default: 2048)")
    debian.add_argument("--mirror", metavar="URL", help="where packages come from (default: as for this machine)")
    debian.add_argument("--anew", action="store_true", help="build it again, with today's versions of all packages")
    debian.add_argument("-o", "--output", type=Path, metavar="FILE", help="put a copy there: *.qcow2, or else a raw image")
    debian.set_defaults(run=_build_debian)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _build_debian(options: argparse.Namespace) -> int:
    from pytest_chvm.base.progress import show_progress
    from pytest_chvm.guest.builders.debian import DebianRecipe, build_debian
    from pytest_chvm.guest.builders.disk import copy_image
    from pytest_chvm.machine.guest_choice import cache_dir
    from pytest_chvm.settings import Settings

    recipe = DebianRecipe(options.suite, options.packages, options.without, options.size_mb, options.mirror)
    image = build_debian(recipe, cache_dir(Settings.resolve()), show_progress, anew=options.anew)
    if options.output is not None:
        image = copy_image(image, options.output)
    sys.stdout.write(f"{image}\n")
    return 0

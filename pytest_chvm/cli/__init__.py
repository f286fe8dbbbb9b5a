"""The `chvm` command: a file a subcommand, which parses its arguments and calls one function that tests call too."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from pytest_chvm.cli import guest, lab, ps, reap, templates


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="chvm", description="Virtual machines for tests.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for subcommand in (guest, lab, templates, ps, reap):
        subcommand.add(commands)
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Under nohup(1) it is to go on.
        if signal.getsignal(number) is not signal.SIG_IGN:
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

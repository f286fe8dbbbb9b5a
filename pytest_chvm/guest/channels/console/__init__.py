"""The channel over a guest's virtio console: a shell that is typed into the `sh` that listens there."""

from __future__ import annotations

from pytest_chvm.guest.channels import Line
from pytest_chvm.guest.channels.console.shell import GuestShell


def open_channel(line: Line) -> GuestShell:
    """Return the shell on a guest's console."""
    return GuestShell(line)

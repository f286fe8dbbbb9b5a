"""Saving a running VM for clones to start from, and having a clone made a machine of its own."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from pytest_chvm.drivers.base import share_id
from pytest_chvm.drivers.boot import CONSOLE_FILE, KERNEL_TIME_FILE
from pytest_chvm.errors import GuestCommandError, UnsupportedError
from pytest_chvm.guest import renewal
from pytest_chvm.guest.channels import RenewingChannel
from pytest_chvm.machine.device import Device
from pytest_chvm.machine.machine import Machine


def save(machine: Machine, directory: Path, *, go_on: bool = True) -> None:
    """Save a VM to an empty directory; without `go_on` it stays paused.

    Its shared dirs are unmounted in the guest meanwhile. Raises UnsupportedError for a guest whose clones could not be renewed.
    """
    machine.check_alive()
    told = (machine.config.cmdline or "").split()
    set_up = machine.guest.set_up_for_saving(
        lambda script, data: machine.run(script, input=data), lambda: machine.ip, told, trial=not go_on
    )
    if not machine.warns_on_console:
        _save_kernel_time(machine, directory / KERNEL_TIME_FILE)
    with _without_shares(machine), _renewing(machine).waiting(lambda token: renewal.waiting_line(set_up, token)):
        machine.driver.pause(machine.handle)
        try:
            machine.driver.snapshot(machine.handle, directory)
            _save_console(machine, directory / CONSOLE_FILE)
        finally:
            if go_on:
                machine.driver.resume(machine.handle)


def renew(machine: Machine, words: Sequence[str]) -> None:
    """Have a clone made a machine of its own, which is told `words`; it then says that it is ready, which is not waited for.

    Raises VmIOError where the renewal does not begin before the boot's deadline.
    """
    line = renewal.line([*words, *_host_key_words(machine)], stale_nics=machine.origin.stale_nics)
    _renewing(machine).renew(renewal.message, line, machine.boot_deadline)


def _host_key_words(machine: Machine) -> list[str]:
    if not machine.guest.takes_host_keys:
        return []
    from pytest_chvm.host.ssh_key import new_host_keys

    keys = new_host_keys(machine.lease.directory, machine.name)
    return [renewal.host_key_word(key.type, key.private, key.public) for key in keys]


def _renewing(machine: Machine) -> RenewingChannel:
    if not isinstance(machine.channel, RenewingChannel):
        raise UnsupportedError(
            f"VM {machine.name!r} cannot be saved: what runs its commands cannot renew a clone", vm_name=machine.name
        )
    return machine.channel


def _save_console(machine: Machine, copy: Path) -> None:
    # Without the ready line: each clone prints its own, which is the one that a test should find.
    marker = machine.handle.ready_marker.encode()
    lines = io.BytesIO(machine.serial_text())
    with copy.open("wb") as saved:
        saved.writelines(line for line in lines if marker not in line)


def _save_kernel_time(machine: Machine, file: Path) -> None:
    """Write down how far the kernel's log was: what it said before is no news of a clone's."""
    with suppress(GuestCommandError):
        times = [message.time_s for message in machine.dmesg() if message.time_s is not None]
        file.write_text(f"{times[-1] if times else -1}")


@contextmanager
def _without_shares(machine: Machine) -> Iterator[None]:
    """Unplug the shared dirs, which no VMM saves, and plug them in again afterwards."""
    from pytest_chvm.machine import hotplug

    shares = list(machine.health.shares)
    unplugged = []
    try:
        for index, served in enumerate(shares):
            _must(machine, ["umount", served.share.mount_point])
            # The end of its virtiofsd is no error from now on.
            machine.health.shares = shares[index + 1 :]
            unplugged.append(index)
            hotplug.unplug(machine, Device(share_id(served.share), "fs", served=served))
        yield
    finally:
        for index in unplugged:
            fresh = hotplug.plug_share(machine, shares[index].share).served
            assert fresh is not None
            shares[index] = fresh
            _must(machine, machine.guest.mount_line(fresh.share))
        machine.health.shares = shares
        machine.handle = replace(machine.handle, sidecars=tuple(served.process for served in shares))


def _must(machine: Machine, command: str | Sequence[str]) -> None:
    machine.check_succeeded(machine.run(command, input=None))

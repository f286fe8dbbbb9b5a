"""Waiting for something in the guest: the guest waits, and what it has come to instead is in the error."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from pytest_chvm.base.deadline import checked_timeout
from pytest_chvm.base.text import clean_text, shown_outputs
from pytest_chvm.base.untouched import random_hex
from pytest_chvm.errors import CommandTimeoutError, GuestCommandError, InvalidConfigError, UnsupportedError, VmError
from pytest_chvm.guest import waits
from pytest_chvm.guest.commands import Place, script_of, shown
from pytest_chvm.machine.machine import Machine
from pytest_chvm.model import CommandResult, check_port

# For what is asked of the guest once it has been waited for in vain.
ASK_TIMEOUT_S = 10.0
HIGHEST_PORT = (1 << 16) - 1
LONGEST_STATE = 4000


def wait_until(machine: Machine, command: str | Sequence[str], timeout: float | None, place: Place | None) -> CommandResult:
    """Have the guest run a command until it succeeds; see `Vm.wait_until`."""
    seconds = checked_timeout(timeout)
    attempts = waits.Attempts(place.script(command) if place else script_of(command), random_hex(8))
    try:
        done = machine.run(attempts.wait_script(), timeout=seconds, input=None)
    except CommandTimeoutError as late:
        last = machine.run(attempts.last_script(), timeout=ASK_TIMEOUT_S, input=None)
        _check_place(machine, place, command, last)
        what = f"it returned {last.returncode} the last time" if last.returncode else "it did not even end once"
        raise CommandTimeoutError(
            f"VM {machine.name!r}: {shown(command)!r} did not succeed within {seconds:g} s; {what}.\n"
            f"{shown_outputs(last.stdout, last.stderr)}",
            vm_name=machine.name,
            returncode=last.returncode or None,
            stdout=last.stdout,
            stderr=last.stderr,
        ) from late
    machine.check_succeeded(done)
    return replace(done, command=shown(command))


def _check_place(machine: Machine, place: Place | None, command: str | Sequence[str], last: CommandResult) -> None:
    if place and (refusal := place.refusal(last.returncode, last.stderr)):
        raise GuestCommandError(f"VM {machine.name!r}: {shown(command)!r} was not run: {refusal}", vm_name=machine.name)


def wait_for_port(machine: Machine, port: int, timeout: float | None) -> None:
    """Block until something in the guest listens at a TCP port; see `Vm.wait_for_port`."""
    check_port(port, HIGHEST_PORT, machine.name)

    def why() -> str:
        tables = machine.run("cat /proc/net/tcp /proc/net/tcp6 2>/dev/null", timeout=ASK_TIMEOUT_S, input=None).stdout
        ports = ", ".join(map(str, waits.open_ports(tables)))
        return f"the TCP ports at which something listens: {ports or 'none'}"

    _wait(machine, waits.port_script(port), f"nothing listens at TCP port {port}", timeout, why)


def wait_for_file(machine: Machine, path: str | os.PathLike[str], timeout: float | None) -> None:
    """Block until there is a file in the guest; see `Vm.wait_for_file`."""
    name = os.fspath(path)
    if not isinstance(name, str) or not name or "\0" in name:
        raise InvalidConfigError(f"path {name!r}: expected that of a file of the guest's", vm_name=machine.name)

    def why() -> str:
        near = machine.run(waits.nearest_script(name), timeout=ASK_TIMEOUT_S, input=None).stdout
        return f"the nearest directory that is there, and what is in it:\n{_bounded(near)}"

    _wait(machine, waits.file_script(name), f"{name!r} is not there", timeout, why)


def wait_for_unit(machine: Machine, unit: str, timeout: float | None) -> None:
    """Block until a systemd unit is active; see `Vm.wait_for_unit`."""
    if not isinstance(unit, str) or not unit or any(not char.isprintable() or char == " " for char in unit):
        raise InvalidConfigError(f"unit {unit!r}: expected the name of a systemd unit", vm_name=machine.name)

    def state() -> str:
        said = machine.run(waits.unit_state_script(unit), timeout=ASK_TIMEOUT_S, input=None)
        return f"its status and journal:\n{_bounded(said.stdout + said.stderr)}"

    name = f"VM {machine.name!r}: the unit {unit!r}"
    done = _wait(machine, waits.unit_script(unit), f"the unit {unit!r} is not active", timeout, state)
    if done.returncode == waits.NO_SYSTEMD:
        raise UnsupportedError(
            f"{name} cannot be waited for: the guest was not started by systemd; use wait_until()", vm_name=machine.name
        )
    if done.returncode == waits.NO_UNIT:
        raise GuestCommandError(f"{name} is not known to the guest's systemd: {state()}", vm_name=machine.name)
    if done.returncode == waits.FAILED:
        raise GuestCommandError(f"{name} has failed; {state()}", vm_name=machine.name)
    machine.check_succeeded(done)


def _wait(machine: Machine, script: str, not_yet: str, timeout: float | None, state: Callable[[], str]) -> CommandResult:
    """Run a script that waits; raises CommandTimeoutError, with what `state` returns, where it does not end in time."""
    seconds = checked_timeout(timeout)
    try:
        return machine.run(script, timeout=seconds, input=None)
    except CommandTimeoutError as late:
        try:
            last = state()
        except VmError as error:
            last = f"its last state is not known: {error}"
        raise CommandTimeoutError(
            f"VM {machine.name!r}: {not_yet} after {seconds:g} s; {last}", vm_name=machine.name, stdout=last
        ) from late


def _bounded(text: str) -> str:
    cleaned = clean_text(text.encode(errors="surrogateescape").decode(errors="replace")).strip()
    return cleaned[-LONGEST_STATE:] or "(nothing)"

"""Waiting for a guest to be ready, and guests that start again: a reboot, or a panic or splat that the test expects."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_chvm.base.deadline import Deadline, checked_timeout
from pytest_chvm.base.text import clean_text
from pytest_chvm.errors import BootFailedError, GuestPanicError, VmError, VmIOError
from pytest_chvm.machine.events import REBOOT
from pytest_chvm.machine.health import console_ends_with, ends_with
from pytest_chvm.machine.machine import Machine

if TYPE_CHECKING:
    from pytest_chvm.model.kernel_log import Splat

# A guest that was not ready in time may answer all the same.
BOOT_STATE_TIMEOUT_S = 20.0


def wait_ready(machine: Machine, timeout: float | None) -> None:
    """Block until the guest is ready; see `Vm.wait_ready`."""
    health = machine.health
    # The deadline of the first boot has passed by the time of a start after a panic.
    first = Deadline.after(machine.boot_deadline.total_s) if health.panicked else machine.boot_deadline
    deadline = first if timeout is None else Deadline.after(checked_timeout(timeout))

    def not_ready() -> BootFailedError:
        handle, said = machine.handle, health.ready.refused
        return BootFailedError(
            f"VM {machine.name!r} was not ready within {deadline.total_s:g} s: expected a line '{handle.ready_marker} IP' on "
            f"its serial console{f'; {said}' if said else ''}. Its console {handle.serial_log} "
            f"{console_ends_with(handle.serial_log, machine.config)}\n{_state_of_boot(machine)}"
            "What to do: raise --chvm-boot-timeout, look at the console, or have the guest print the line when it is up.",
            vm_name=machine.name,
        )

    starts_anew = health.panicked
    ip = health.wait_for(health.ready.scan, deadline, not_ready)
    if starts_anew:
        machine.started_anew()
    if (failed := health.not_set_up()) is not None:
        raise failed
    machine.splats.note_ready()
    machine.log.add_ready(ip)


def _state_of_boot(machine: Machine) -> str:
    """Return what the guest itself says that it is still waiting for, as lines; nothing where it does not say."""
    script = machine.guest.boot_state
    if script is None:
        return ""
    try:
        said = machine.channel.run(script, timeout=BOOT_STATE_TIMEOUT_S, input=None).stdout
    except VmError:
        return ""
    return f"Its system says:\n{clean_text(said)[:4000].rstrip()}\n" if said.strip() else ""


def reboot(machine: Machine, timeout: float | None) -> None:
    """Have the guest reboot and block until it is ready again; see `Vm.reboot`."""
    timeout = checked_timeout(timeout)
    machine.allow_reboot()
    machine.handle = replace(machine.handle, nonce=machine.guest.nonce_after_reboot(machine.handle.nonce))
    machine.log.add(REBOOT)
    machine.splats.start_anew()
    machine.health.start_anew(machine.handle.nonce)
    machine.channel.tell("sync; reboot -f", timeout)
    wait_ready(machine, timeout)
    machine.started_anew()


@contextmanager
def expect_panic(machine: Machine, timeout: float) -> Iterator[None]:
    """Expect the guest's kernel to panic in the block or soon after it; see `Vm.expect_panic`."""

    def none() -> VmIOError:
        return VmIOError(
            f"VM {machine.name!r}: the guest did not panic within {timeout:g} s, and was expected to; its console "
            f"{ends_with(machine.handle.serial_log)}",
            vm_name=machine.name,
        )

    health = machine.health
    machine.check_alive()
    machine.allow_reboot()
    health.expects_panic = True
    machine.splats.collect()
    before = machine.splats.untaken
    try:
        yield
        health.wait_for(lambda: None, Deadline.after(timeout), none)
    except GuestPanicError as error:
        health.panic_was_expected(error)
        machine.splats.start_anew()
        # What it died of is expected too.
        machine.splats.take(lambda splat: splat not in before)
        health.start_anew(machine.handle.nonce)
        machine.channel.close()
    except BaseException:
        with suppress(VmError):
            machine.driver.settle(machine.handle)
        raise
    finally:
        health.expects_panic = False


@dataclass
class ExpectedSplat:
    """What `Vm.expect_splat` gives its block: `splat` is there after it."""

    splat: Splat | None = None


@contextmanager
def expect_splat(machine: Machine, pattern: re.Pattern[str], timeout: float) -> Iterator[ExpectedSplat]:
    """Expect a splat in the block or soon after it; see `Vm.expect_splat`."""
    machine.check_alive()
    expected = ExpectedSplat()
    others: list[str] = []

    def look() -> Splat | None:
        machine.splats.collect()
        others[:] = [splat.title for splat in machine.splats.untaken]
        return next(iter(machine.splats.take(lambda splat: pattern.search(splat.text) is not None)), None)

    def none() -> VmIOError:
        came = f"What came was: {'; '.join(others)}" if others else "Its kernel has reported nothing"
        return VmIOError(
            f"VM {machine.name!r}: no splat that matches {pattern.pattern!r} came within {timeout:g} s, and one was expected to. "
            f"{came}. Its console {ends_with(machine.handle.serial_log)}",
            vm_name=machine.name,
        )

    yield expected
    expected.splat = machine.health.wait_for(look, Deadline.after(timeout), none)

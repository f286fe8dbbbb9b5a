"""What a test's report says of splats of its guests' kernels, and whether it fails for them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from pytest_chvm.plugin.keys import factories_key, settings_key, splats_key
from pytest_chvm.plugin.marker import marker_arguments

if TYPE_CHECKING:
    from pytest_chvm.errors import GuestSplatError
    from pytest_chvm.machine.vm import Vm
    from pytest_chvm.model.kernel_log import Splat

# Of one phase of a test.
MOST_TOLD = 20


def splats_of(item: pytest.Item) -> list[GuestSplatError]:
    """Return the errors that a test has to fail with for what its VMs' kernels have reported since it was last asked.

    What it does not fail for, and is to be told, is remembered for the summary.
    """
    factories = item.config.stash[factories_key]
    mode = item.config.stash[settings_key].kernel_splat
    new = [(vm, splat) for factory in factories for vm in list(factory.vms) for splat in vm.machine.take_splats()]
    if not new or mode == "ignore":
        return []
    allowed = allowed_splats(item)
    errors = []
    for vm, splat in new:
        if any(pattern.search(splat.text) for pattern in allowed):
            continue
        if len(item.stash.setdefault(splats_key, [])) < MOST_TOLD:
            item.stash[splats_key].append(_in_a_line(vm, splat))
        is_oops = _is_oops(vm, splat)
        if mode == "fail" or is_oops:
            errors.append(_error(vm, splat, is_oops=is_oops))
    return errors


def allowed_splats(item: pytest.Item) -> list[re.Pattern[str]]:
    """Return the patterns of the splats that a test's marker allows; raises InvalidConfigError for one that is none."""
    from pytest_chvm.errors import InvalidConfigError

    given: Any = marker_arguments(item).get("allow_splats", ())
    patterns = []
    for pattern in [given] if isinstance(given, str | re.Pattern) else given:
        try:
            patterns.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise InvalidConfigError(
                f"allow_splats={given!r} of the marker chvm: {pattern!r} is no regular expression: {error}"
            ) from error
    return patterns


def _is_oops(vm: Vm, splat: Splat) -> bool:
    """Tell whether a kernel had an oops and went on, by its own word where it can still be asked."""
    from pytest_chvm.guest.splats import has_oops

    return has_oops(splat.text) and not vm.machine.health.told and (vm.machine.ended or vm.machine.had_oops())


def _error(vm: Vm, splat: Splat, *, is_oops: bool) -> GuestSplatError:
    from pytest_chvm.errors import GuestOopsError, GuestSplatError
    from pytest_chvm.machine.kernel import with_source

    kind = GuestOopsError if is_oops else GuestSplatError
    known = [splat.taint, splat.modules and f"modules: {' '.join(splat.modules)}"]
    return kind(
        f"VM {vm.name!r}: the guest's kernel {'had an oops and went on' if is_oops else 'reported'}: {splat.title}\n"
        f"{'; '.join([_when(splat), *(each for each in known if each)])}\n{with_source(vm.machine, splat.text)}\n"
        "Where it is meant to be: vm.expect_splat(PATTERN), or allow_splats=[PATTERN] of the marker chvm. Its console: "
        f"{vm.serial_log}",
        vm_name=vm.name,
    )


def _when(splat: Splat) -> str:
    if splat.in_boot:
        return "While it booted"
    if not splat.commands:
        return "While no command of the test's ran"
    shown = " and ".join(repr(command if len(command) <= 200 else f"{command[:200]}...") for command in splat.commands)
    return f"While {shown} ran"


def _in_a_line(vm: Vm, splat: Splat) -> str:
    return f"VM {vm.name}: {splat.title[:200]}. {_when(splat)}"


def summary(terminalreporter: Any) -> None:
    """Say in the summary of a run what the kernels of its guests have reported."""
    told = [
        (report.nodeid, report.when, line)
        for reports in terminalreporter.stats.values()
        for report in reports
        for line in getattr(report, "chvm_splats", ())
    ]
    if not told:
        return
    terminalreporter.write_sep("=", "kernel splats")
    for nodeid, when, line in told:
        terminalreporter.write_line(f"{nodeid}{'' if when == 'call' else f' ({when})'}: {line}")
    terminalreporter.write_line("--chvm-kernel-splat=fail has tests fail for these, --chvm-kernel-splat=ignore leaves them out")

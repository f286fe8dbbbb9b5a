"""Hooks around each test: which VMs are its own, what happened to them, and their sections of its report."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from pytest_chvm.plugin.keys import (
    DEFAULT_ARTIFACTS,
    attempt_key,
    factories_key,
    failed_key,
    item_key,
    making_key,
    settings_key,
    splats_key,
    teardown_key,
)
from pytest_chvm.plugin.run import worker_of

if TYPE_CHECKING:
    from pytest_chvm.errors import VmError
    from pytest_chvm.machine.vm import Vm
    from pytest_chvm.plugin.factory import VmFactory


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Have a test fail for what has befallen its VMs after its last call."""
    __tracebackhide__ = True
    try:
        result = yield
    except Exception as error:
        if (trouble := _trouble(item)) is not None:
            error.add_note(f"{type(trouble).__name__}: {trouble}")
        raise
    if (trouble := _trouble(item)) is not None:
        raise trouble
    return result


def _trouble(item: pytest.Item) -> VmError | None:
    if not item.config.stash[factories_key]:
        return None
    from pytest_chvm.plugin.checkup import check_up

    return check_up(item)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """End whatever a test's VMs have left, and have the test fail for it, and for what their kernels have reported meanwhile."""
    factories: list[VmFactory] = item.config.stash[factories_key]
    try:
        with ExitStack() as ends:
            item.config.stash[teardown_key] = ends
            result = yield
    except BaseException as error:
        for wrong in _wrong_after(item, factories):
            error.add_note(str(wrong))
        raise
    first, *others = [*_wrong_after(item, factories), None]
    if first is not None:
        for other in others:
            if other is not None:
                first.add_note(str(other))
        raise first
    return result


def _wrong_after(item: pytest.Item, factories: list[VmFactory]) -> list[VmError]:
    """Return what is wrong after a test's fixtures are gone."""
    if not factories:
        return []
    from pytest_chvm.errors import StopFailedError
    from pytest_chvm.plugin.splats import splats_of

    splats = splats_of(item)
    left = _end_what_is_left(factories)
    return [*([StopFailedError(_left_behind(item, left))] if left else []), *splats]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(request: pytest.FixtureRequest) -> Generator[None, object, object]:
    """Remember which fixture is being made: a clone of a snapshot that it starts ends with it."""
    making = request.config.stash[making_key]
    making.append(request)
    try:
        return (yield)
    finally:
        making.pop()


def at_end_of_caller(config: pytest.Config, end: Callable[[], None]) -> None:
    """Have something done at the end of what runs now: the fixture that is being made, the test, or a teardown."""
    if making := config.stash[making_key]:
        making[-1].addfinalizer(end)
    elif teardown_key in config.stash:
        config.stash[teardown_key].callback(end)
    else:
        config.stash[item_key].addfinalizer(end)


def _end_what_is_left(factories: list[VmFactory]) -> list[str]:
    return [what for factory in factories if factory.closed for what in factory.end_what_is_left()]


def _left_behind(item: pytest.Item, left: list[str]) -> str:
    return (
        f"{item.nodeid} has left behind: {', '.join(left)}. It should have been gone with the test's fixtures, and was ended now."
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Remember the test that runs: a clone of a snapshot ends with it, whichever fixture the snapshot is from.

    Have it fail for what its VMs' kernels have reported meanwhile.
    """
    item.config.stash[item_key] = item
    if teardown_key in item.config.stash:
        del item.config.stash[teardown_key]
    # It may be run again, by pytest-rerunfailures for instance.
    item.stash[attempt_key] = item.stash.get(attempt_key, 0) + 1
    item.stash[failed_key] = False
    result = yield
    if item.config.stash[factories_key]:
        from pytest_chvm.plugin.splats import splats_of

        if errors := splats_of(item):
            raise errors[0]
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the consoles of a failed test's VMs into its report, and keep logs where that was asked for."""
    report = yield
    if report.failed and call.when != "teardown":
        _skip_where_asked_for(item, call, report)
    # Not its keywords: a directory's name is among them as well. Attributes reach xdist's controller.
    report.chvm_used = item.get_closest_marker("chvm") is not None  # type: ignore[attr-defined]
    if splats := item.stash.get(splats_key, None):
        report.chvm_splats = [*splats]  # type: ignore[attr-defined]
        splats.clear()
    factories = item.config.stash[factories_key]
    if report.failed:
        item.stash[failed_key] = True
    if factories and (report.failed or report.when == "teardown"):
        _report_vms(item, report, factories)
    return report


def _skip_where_asked_for(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
    """Turn what the machine lacks into a skip, where --chvm-missing=skip asks for that, wherever in the test it was found out."""
    # As long as our errors module is not imported, no error is ours.
    if call.excinfo is None or item.config.stash[settings_key].missing != "skip" or "pytest_chvm.errors" not in sys.modules:
        return
    from pytest_chvm.errors import MissingRequirementError

    error = call.excinfo.value
    if isinstance(error, MissingRequirementError):
        call.excinfo = pytest.CallInfo.from_call(lambda: pytest.skip(f"no VM here: {error}"), call.when).excinfo
        path, line, _name = item.reportinfo()
        report.outcome = "skipped"
        report.longrepr = (os.fspath(path), (line or 0) + 1, f"Skipped: no VM here: {error}")


def _panic_of(vm: Vm) -> str | None:
    from pytest_chvm.machine.events import PANIC, last_of
    from pytest_chvm.machine.kernel import with_source
    from pytest_chvm.machine.splats import panic_on_console

    text = panic_on_console(vm.serial_log) if last_of(vm.events, PANIC) else None
    return text and with_source(vm.machine, text)


def _gdb_of(vm: Vm) -> str | None:
    return shlex.join(vm.gdb_command) if vm.config.gdb else None


def _report_vms(item: pytest.Item, report: pytest.TestReport, factories: list[VmFactory]) -> None:
    from pytest_chvm.report.sections import VmRecord, directory_of, keep_logs, sections_of

    settings = item.config.stash[settings_key]
    # A template and the VM that it was built for share a log.
    vms = {vm.serial_log: vm for factory in factories for vm in factory.vms}
    told = vms.values() if report.failed else ()
    panics, gdb = {vm.name: _panic_of(vm) for vm in told}, {vm.name: _gdb_of(vm) for vm in told}
    records = [
        VmRecord(vm.name, vm.serial_log, vm.vmm_log, vm.handle.event_log, vm.events, panics.get(vm.name), gdb.get(vm.name))
        for vm in vms.values()
    ]
    name = directory_of(item.nodeid, worker_of(item.config), item.stash.get(attempt_key, 1))
    place = (settings.artifacts or item.config.rootpath / DEFAULT_ARTIFACTS) / name
    if report.failed:
        report.sections.extend(sections_of(records))
        if settings.core == "failed" and settings.keep != "never":
            from pytest_chvm.report.memory import keep_memory

            report.sections.extend(keep_memory(vms.values(), place))
    if report.when == "teardown":
        failed = item.stash.get(failed_key, False)
        if settings.keep == "always" or (settings.keep == "failed" and failed):
            try:
                keep_logs(records, place)
            except OSError as error:
                report.sections.append(("logs of VMs", f"they cannot be kept: {error}"))
        # Those of the session's go on, but for the clones that ended with this test.
        factories[:] = [factory for factory in factories if not factory.closed]
        for factory in factories:
            factory.forget_ended()

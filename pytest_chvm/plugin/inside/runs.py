"""The hooks that run a test in a guest in place of pytest's own; registered where there are such tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import pytest

from pytest_chvm.errors import InvalidConfigError, VmError, VmIOError
from pytest_chvm.plugin.fixtures import time_limit_s
from pytest_chvm.plugin.inside.checks import check_inside
from pytest_chvm.plugin.inside.places import Place, follower, kind_of_place, place_for
from pytest_chvm.plugin.inside.session import GuestPytest
from pytest_chvm.plugin.inside.wire import relay_warning, unpack_report
from pytest_chvm.plugin.kernel_needs import check_kernel
from pytest_chvm.plugin.marker import inside_of

# The guest's own time limit is to end a test first: its report shows where that was.
GRACE_S = 10.0

Phase = Literal["setup", "call", "teardown"]


class FailedInGuestError(Exception):
    """A phase of a test has failed in its guest; `report` says how."""

    def __init__(self, report: pytest.TestReport) -> None:
        super().__init__(getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longreprtext))
        self.report = report


class InsideRuns:
    """Runs the tests of a session that are to run in a guest; one guest at a time."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._place: Place | None = None
        # What this phase of a test is here, and the report of it that has come.
        self._step: Callable[[], pytest.TestReport | None] | None = None
        self._came: pytest.TestReport | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """Run a test in a guest."""
        if inside_of(item) is None:
            return None
        reruns: Any = self._config.pluginmanager.get_plugin("rerunfailures")
        if hasattr(reruns, "runtestprotocol"):
            # It runs a test again and again by pytest's function, which it has imported, and tells of each attempt itself.
            original, reruns.runtestprotocol = reruns.runtestprotocol, self._run
            try:
                if reruns.pytest_runtest_protocol(item, nextitem):
                    return True
            finally:
                reruns.runtestprotocol = original
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        self._run(item, nextitem=nextitem)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    @pytest.hookimpl(tryfirst=True, optionalhook=True)
    def pytest_timeout_set_timer(self, item: pytest.Item) -> bool | None:
        """Leave a test's time limit to the pytest in its guest: a boot does not count."""
        return True if inside_of(item) is not None else None

    def pytest_sessionfinish(self) -> None:
        """End what an interrupted run has left."""
        self._leave()

    def _run(self, item: pytest.Item, log: bool = True, nextitem: pytest.Item | None = None) -> list[pytest.TestReport]:
        """Run a test once, in place of pytest's `runtestprotocol`; returns the reports of its phases."""
        if item.session.shouldfail or item.session.shouldstop:
            nextitem = None
        reports = [self._phase(item, "setup", lambda: self._set_up(item, nextitem), log)]
        if reports[0].passed and not self._config.getoption("setuponly", False):
            reports.append(self._phase(item, "call", lambda: self._answered(item, "call"), log))
        tear_down = partial(self._tear_down, item, nextitem)
        reports.append(self._phase(item, "teardown", tear_down, log, nextitem=nextitem))
        return reports

    def _phase(
        self, item: pytest.Item, when: Phase, step: Callable[[], pytest.TestReport | None], log: bool, **arguments: object
    ) -> pytest.TestReport:
        """Do a phase of a test as pytest does, but that of all plugins only this one, and reruns, know of it out here."""
        self._step, self._came = step, None
        try:
            hook = self._hook(f"pytest_runtest_{when}")
            call = pytest.CallInfo.from_call(
                lambda: hook(item=item, **arguments), when, reraise=(pytest.exit.Exception, KeyboardInterrupt)
            )
            report: pytest.TestReport = self._hook("pytest_runtest_makereport")(item=item, call=call)
        finally:
            self._step = None
        if log:
            item.ihook.pytest_runtest_logreport(report=report)
        return report

    def _hook(self, name: str) -> Callable[..., Any]:
        plugins = self._config.pluginmanager
        reruns = plugins.get_plugin("rerunfailures") if name == "pytest_runtest_makereport" else None
        ours = (self, sys.modules["pytest_chvm.plugin"], reruns)
        return plugins.subset_hook_caller(name, [plugin for plugin in plugins.get_plugins() if plugin not in ours])

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_setup(self) -> None:
        """Do the step, if it is one of a test in a guest."""
        self._take_step()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_call(self) -> None:
        """Do the step, if it is one of a test in a guest."""
        self._take_step()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self) -> None:
        """Do the step, if it is one of a test in a guest."""
        self._take_step()

    def _take_step(self) -> None:
        if self._step is not None:
            self._came = self._step()
            if self._came is not None and self._came.failed:
                raise FailedInGuestError(self._came)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> pytest.TestReport | None:
        """Return the report that has come, of a test in a guest, or one of what went wrong out here."""
        if self._step is None:
            return None
        error = call.excinfo.value if call.excinfo is not None else None
        if self._came is not None and (error is None or isinstance(error, FailedInGuestError)):
            notes = getattr(error, "__notes__", ())
            self._came.sections.extend(("beside it", note) for note in notes)
            return self._came
        report = pytest.TestReport.from_item_and_call(item, call)
        if isinstance(error, VmError):
            # Where in this package it was raised tells nobody anything.
            report.longrepr = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
        if self._came is not None:
            report.sections.extend(self._came.sections)
        return report

    def _set_up(self, item: pytest.Item, nextitem: pytest.Item | None) -> pytest.TestReport:
        check_inside(item)
        check_kernel(item)
        if self._place is not None and self._place.what != kind_of_place(item):
            self._leave()
        if self._place is None:
            self._place = place_for(item)
        self._place.start(item)
        after = follower(item, nextitem)
        return self._answered(item, "setup", test=_name(item), next=_name(after) if after else None)

    def _tear_down(self, item: pytest.Item, nextitem: pytest.Item | None) -> pytest.TestReport | None:
        place, came = self._place, None
        with ExitStack() as last:
            # Those of fixtures out here that tests before this one had.
            last.callback(item.session._setupstate.teardown_exact, nextitem)
            if place is not None and place.inner is not None and place.busy:
                last.callback(lambda: self._leave() if place.inner is None or follower(item, nextitem) is None else None)
                came = self._answered(item, "teardown")
                place.busy = False
            else:
                self._leave()
        return came

    def _leave(self) -> None:
        if (place := self._place) is not None:
            self._place = None
            place.leave()

    def _answered(self, item: pytest.Item, when: str, **asked: object) -> pytest.TestReport:
        """Ask for the report of a phase; those of its subtests are passed on."""
        place = self._place
        assert place is not None
        assert place.inner is not None
        limit = time_limit_s(self._config, item)
        place.busy = True
        try:
            answer = place.inner.ask(None if limit is None else limit + GRACE_S, **asked)
        except BaseException:
            place.inner = None
            raise
        if "missing" in answer:
            place.busy = False
            raise InvalidConfigError(_missing(item, answer))
        if "exit" in answer:
            place.inner = None
            if answer.get("is_exit"):
                pytest.exit(str(answer["exit"]), answer.get("returncode") if isinstance(answer.get("returncode"), int) else None)
            raise KeyboardInterrupt(f"in the guest of {item.nodeid}")
        try:
            reports = [unpack_report(item, data) for data in answer["reports"]]
            for data in answer["warnings"]:
                relay_warning(item, data)
            report = next(report for report in reversed(reports) if type(report) is pytest.TestReport)
            if report.when != when:
                raise ValueError(f"a report of {report.when} in place of {when}")
        except (ValueError, TypeError, KeyError, StopIteration) as error:
            place.inner = None
            raise VmIOError(f"the pytest in the guest answered what is no report of {item.nodeid}: {error}") from error
        for each in reports:
            if each is not report:
                item.ihook.pytest_runtest_logreport(report=each)
        self._show(place.inner, answer)
        return report

    def _show(self, inner: GuestPytest, answer: dict[str, Any]) -> None:
        """Show what pytest shows of fixtures, where that is asked for, and what the test prints, where it is not captured."""
        if self._config.getoption("setupshow", False):
            self._config.get_terminal_writer().write(str(answer.get("shown", "")))
        if self._config.getoption("capture") == "no":
            sys.stdout.write(inner.printed())


def _name(item: pytest.Item) -> str:
    """Return the node id of a test as a run without workers has it."""
    grouped = getattr(item.config.option, "loadgroup", False) and item.get_closest_marker("xdist_group") is not None
    return item.nodeid.rpartition("@")[0] if grouped else item.nodeid


def _missing(item: pytest.Item, answer: dict[str, Any]) -> str:
    errors = answer.get("collection")
    if errors and isinstance(errors, list):
        return f"{item.path} cannot be collected in the guest:\n" + "\n".join(map(str, errors))
    return (
        f"the pytest in the guest has no test {item.nodeid}: what the tests of its file, or their parameters, are called depends "
        "on something that is not the same there"
    )

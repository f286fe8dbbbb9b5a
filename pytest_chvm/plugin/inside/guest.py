"""The plugin of the pytest in the guest: it is asked for tests, one after the other, and answers with their reports.

Loaded before pytest loads its other plugins, of which this package is one: nothing of it is imported here but in functions.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import sys
from collections.abc import Generator
from typing import Any

import pytest

# What is the business of the run out there: workers, reruns, when to stop, the files of its reports.
OUT_THERE: dict[str, Any] = {
    "numprocesses": None,
    "maxprocesses": None,
    "dist": "no",
    "distload": False,
    "looponfail": False,
    "tx": [],
    "forked": False,
    "usepdb": False,
    "trace": False,
    "maxfail": 0,
    "collectonly": False,
    "lf": False,
    "failedfirst": False,
    "newfirst": False,
    "stepwise": False,
    "stepwise_skip": False,
    "cacheclear": False,
    "xmlpath": None,
    "htmlpath": None,
    "report_log": None,
    "log_file": None,
    "pastebin": None,
    "pyargs": False,
}

# A test may have put something else in their places when it is reported.
_open, _read, _write, _close, _dumps = os.open, os.read, os.write, os.close, json.dumps


class Example:
    """In place of `Guest` in the run that shows what any job needs."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> None:
        """Have no thread started by it."""
        config.pluginmanager.unregister(name="rerunfailures")


class Guest:
    """Answers what is asked through the FIFOs of a directory."""

    def __init__(self, directory: str, job: dict[str, Any], coverage: Any) -> None:
        self._directory = directory
        self._job = job
        self._coverage = coverage
        self._reports: list[dict[str, Any]] = []
        self._warnings: list[dict[str, Any]] = []
        self._collection: list[str] = []
        self._shown = io.StringIO()
        # What was shown before the last report, which is held back.
        self._shown_before = ""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> Generator[None, object, object]:
        """Run one file's tests, and nothing else of what the command line says."""
        from pytest_chvm.plugin.keys import in_guest_key

        # Its plugins are loaded; tests see what is there.
        if (remembered := sys.modules.get("pytest_chvm_inside_remembered")) is not None:
            remembered.forget_distributions()
        for name, value in OUT_THERE.items():
            if hasattr(config.option, name):
                setattr(config.option, name, value)
        config.option.basetemp = os.path.join(self._job["directory"], "tmp")
        config.args = [self._job["file"]]
        config.stash[in_guest_key] = True
        config.pluginmanager.unregister(name="rerunfailures")
        return (yield)

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Know all markers of the run out there, and keep what is shown apart from what tests print."""
        for line in self._job["markers"]:
            config.addinivalue_line("markers", line)
        config.get_terminal_writer()._file = self._shown

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> Generator[None, object, object]:
        """Find out by which names they are asked for."""
        result = yield
        self._items: dict[str, pytest.Item] = {}
        for item in items:
            self._items.setdefault(item.nodeid, item)
        return result

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remember why there is a test missing."""
        if report.failed:
            self._collection.append(report.longreprtext)

    def pytest_internalerror(self, excrepr: object) -> None:
        """Have it among what the program has printed."""
        os.write(2, f"{excrepr}\n".encode(errors="backslashreplace"))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run what is asked for, until there is nothing more."""
        # It was asked for this by being started.
        self._is_asked = True
        self._answer(collected=True)
        while "test" in (asked := self._asked()):
            try:
                self._run(session, asked["test"], asked["next"])
            except (pytest.exit.Exception, KeyboardInterrupt) as error:
                self._answer(
                    exit=str(error), returncode=getattr(error, "returncode", None), is_exit=isinstance(error, pytest.exit.Exception)
                )
                return True
        if self._coverage is not None:
            self._coverage.stop()
            self._coverage.save()
            with open(self._coverage.get_data().data_filename(), "rb") as file:
                self._answer(coverage=base64.b64encode(file.read()).decode())
        return True

    def _run(self, session: pytest.Session, name: str, next_name: str | None) -> None:
        if (item := self._items.get(name)) is None:
            self._answer(missing=name, collection=self._collection)
            return
        # Where the tests came in another order than was foreseen.
        session._setupstate.teardown_exact(item)
        session.shouldstop = session.shouldfail = False
        self._shown_before = ""
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=self._items.get(next_name or ""))
        # Pytest tells of a test's warnings after its last report.
        self._answer(when="teardown", shown=self._shown_before)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logstart(self) -> None:
        """Drop what pytest shows of the start: that is shown out there too."""
        self._take_shown()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> Generator[None, object, object]:
        """Send the report of a phase, with those of its subtests."""
        shown = self._take_shown()
        result = yield
        self._take_shown()
        config = self._config
        self._reports.append(config.hook.pytest_report_to_serializable(config=config, report=report))
        # A subtest's has a class of its own.
        if type(report) is pytest.TestReport and report.when != "teardown":
            # What comes now may be the end of the guest, and of the next phase it is to be.
            self._answer(when=report.when, shown=shown, then_wait=True)
        else:
            self._shown_before += shown
        return result

    @pytest.hookimpl
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Remember the configuration."""
        self._config = session.config

    def pytest_warning_recorded(self, warning_message: Any, when: str, nodeid: str, location: Any) -> None:
        """Send a test's warnings; others were given out there too."""
        from pytest_chvm.plugin.inside.wire import pack_warning

        if when == "runtest":
            self._warnings.append(pack_warning(warning_message, location))

    def _take_shown(self) -> str:
        shown = self._shown.getvalue()
        self._shown.seek(0)
        self._shown.truncate()
        return shown

    def _asked(self) -> dict[str, Any]:
        line = b""
        # Each time anew: a test may close all descriptors that it does not know. The parent keeps it open.
        fd = _open(os.path.join(self._directory, "ask"), os.O_RDONLY | os.O_CLOEXEC)
        try:
            while not line.endswith(b"\n"):
                line += _read(fd, 1)
        finally:
            _close(fd)
        self._is_asked = True
        asked: dict[str, Any] = json.loads(line)
        return asked

    def _answer(self, *, then_wait: bool = False, **what: object) -> None:
        """Answer, with the reports and warnings that have come up; blocks until it is asked and that is read.

        `then_wait`: and until it is asked for the next one.
        """
        what |= {"reports": self._reports, "warnings": self._warnings}
        data = _dumps(what, default=repr, skipkeys=True).encode() + b"\n"
        # A test's time limit is not to end this.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        try:
            # One answer to each: who reads would not see where one of two ends.
            if not self._is_asked:
                self._asked()
            self._is_asked = False
            fd = _open(os.path.join(self._directory, "answer"), os.O_WRONLY | os.O_CLOEXEC)
            try:
                while data:
                    data = data[_write(fd, data) :]
            finally:
                _close(fd)
            if then_wait:
                self._asked()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._reports, self._warnings = [], []

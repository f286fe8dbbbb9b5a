"""`chvm_ktap`: a test program in a guest, each of whose results is one of pytest's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_chvm.guest.ktap import KtapReport, KtapResult
    from pytest_chvm.machine.vm import Vm

# What a program of kselftest returns where it has run nothing (tools/testing/selftests/kselftest.h, KSFT_SKIP).
SKIPPED = 4
TIMEOUT_S = 60.0
# Of the failures so many are shown in one message, and of an output so many characters.
SHOWN = 50
SHOWN_CHARACTERS = 4000


class Ktap:
    """The value of the fixture `chvm_ktap`: called with a VM and a command, it reports each result that the command prints."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request

    def __call__(
        self,
        vm: Vm,
        command: str | Sequence[str],
        *,
        timeout: float | None = TIMEOUT_S,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        by_status: bool = False,
    ) -> KtapReport:
        """Run a command in a VM that prints KTAP or TAP to its standard output, and return what it said.

        The arguments are those of `Vm.run`. Each result is a subtest of the test's where pytest has subtests (from 9 on, or with
        pytest-subtests), else all that failed are one failure. The test fails as well where a plan was not finished, where the
        program ended with an error that no result shows, and after `timeout` seconds, with the results that came before. It is
        skipped where the program says that there is nothing to run. `by_status`: it need not print any result, its exit status is
        one: 0 for passed, 4 for skipped.
        """
        __tracebackhide__ = True
        from pytest_chvm.errors import VmError

        lines: list[str] = []
        end: VmError | None = None
        returncode = None
        try:
            returncode = _run(vm, command, lines, timeout, cwd=cwd, env=env, user=user)
        except VmError as error:
            end = error
            if not lines:
                raise
        return self._report(lines, returncode, end, by_status=by_status)

    def parse(self, text: str) -> KtapReport:
        """Report the results in a text, as of a command that printed it and succeeded: of a log, for instance."""
        __tracebackhide__ = True
        return self._report(text.splitlines(), 0, None)

    def kunit(self, vm: Vm, module: str | os.PathLike[str] | None = None) -> KtapReport:
        """Report what KUnit says in a VM's kernel log: of the suites that ran when it booted, or of a module that is loaded for it.

        `module` is a file of the host's. A log that no longer has its beginning is an error: give the VM a larger one
        (`cmdline_extra="log_buf_len=4M"`).
        """
        __tracebackhide__ = True
        from pytest_chvm.machine.kunit import boot_log, log_of_module

        return self.parse(boot_log(vm) if module is None else log_of_module(vm, Path(module)))

    def _report(
        self, lines: Sequence[str], returncode: int | None, end: Exception | None, *, by_status: bool = False
    ) -> KtapReport:
        """Report what a program has printed and how it ended; `end` is what befell it."""
        __tracebackhide__ = True
        from pytest_chvm.base.text import clean_text
        from pytest_chvm.guest.ktap import NOTHING, KtapReport, parse_ktap

        report = parse_ktap(lines)
        output = clean_text("".join(f"{line.rstrip()}\n" for line in lines)[-SHOWN_CHARACTERS:]).strip()
        if by_status and not report.results and report.problems == (NOTHING,):
            report = KtapReport()
        if not report.results and (report.skipped is not None or returncode == SKIPPED):
            pytest.skip(report.skipped or output or "the program has skipped itself")
        failures = [_shown(result) for result in report.results if result.outcome == "failed"]
        with_subtests = self._report_subtests(report.results)
        problems = list(report.problems)
        if returncode not in (0, None) and not failures and not (returncode == SKIPPED and _all_skipped(report)):
            problems.append(f"the program ended with status {returncode}, and no result says why")
        if failures and not with_subtests:
            problems = [f"{len(failures)} of {len(report.results)} tests failed:", *failures[:SHOWN], *problems]
        if end is not None:
            if problems or failures:
                end.add_note("\n".join(problems or failures[:SHOWN]))
            raise end
        if problems:
            pytest.fail("\n".join([*problems, "output:", output or "(nothing)"]), pytrace=False)
        return report

    def _report_subtests(self, results: Sequence[KtapResult]) -> bool:
        """Report each result as a subtest; returns whether this pytest has any."""
        try:
            subtests: Any = self._request.getfixturevalue("subtests")
        except pytest.FixtureLookupError:
            return False
        for result in results:
            subtest: AbstractContextManager[None] = subtests.test(msg=result.name)
            with subtest:
                _be(result)
        return True


def _run(vm: Vm, command: str | Sequence[str], lines: list[str], timeout: float | None, **place: Any) -> int:
    """Run a command and return its status; `lines` has what it prints, of both outputs, also where that does not end well."""
    from pytest_chvm.base.deadline import Deadline, checked_timeout
    from pytest_chvm.errors import CommandTimeoutError

    deadline = Deadline.after(checked_timeout(timeout))

    def left_s() -> float:
        # None left is no limit to those who are told.
        return max(deadline.remaining_s, 0.001)

    both = f"exec 2>&1\n{command}" if isinstance(command, str) else ["sh", "-c", 'exec "$@" 2>&1', "sh", *command]
    with vm.popen(both, **place) as process:
        try:
            while line := process.stdout.readline(left_s()):
                lines.append(line)
            return process.wait(left_s())
        except CommandTimeoutError as error:
            raise CommandTimeoutError(
                f"VM {vm.name!r}: {command!r} did not end within {deadline.total_s:g} s, and was killed", vm_name=vm.name
            ) from error


def _be(result: KtapResult) -> None:
    """Be the test that has this result."""
    __tracebackhide__ = True
    if result.outcome == "skipped":
        pytest.skip(result.reason or "skipped")
    if result.outcome == "xfailed":
        pytest.xfail(result.reason or "expected to fail")
    if result.outcome == "failed":
        pytest.fail(_shown(result), pytrace=False)


def _shown(result: KtapResult) -> str:
    reason = f": {result.reason}" if result.reason else ""
    said = "".join(f"\n  {line}" for line in result.said.splitlines())
    return f"{result.name}{reason}{said}"


def _all_skipped(report: KtapReport) -> bool:
    return all(result.outcome == "skipped" for result in report.results)

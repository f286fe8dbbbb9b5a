"""What a test program says of its tests, in the kernel's KTAP or in TAP.

KTAP 1: Documentation/dev-tools/ktap.rst of the kernel; TAP 13 and 14: testanything.org. Where they leave open what is meant, it is
what tools/testing/kunit/kunit_parser.py makes of it. The text is a guest's, and may be cut off or hostile: whatever it is, it is
read to its end, with bounds on depth, results and what is kept of a line.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from pytest_chvm.base.text import clean_text

Outcome = Literal["passed", "failed", "skipped", "xfailed"]

DEEPEST = 16
MOST_RESULTS = 20_000
LONGEST_LINE = 4096
# So much of what is said beside the results is kept for each of them.
LINES_SAID = 50
# As a tab counts in what is indented by both.
TAB = 4

# What printk puts before a line, levels and the caller too: "<6>[    0.060000][    T1] ".
KERNEL_PREFIX = re.compile(r"(?:<\d{1,3}>)?\[ *\d{1,10}\.\d{1,9}\](?:\[ *[TC]\d{1,10}\])? ?")
VERSION = re.compile(r"K?TAP version \d{1,9}\s*")
PLAN = re.compile(r"\d{1,9}\.\.(\d{1,9})(?:\s*#\s*(.*))?\s*")
SUBTEST = re.compile(r"# Subtest(?:: (.*))?")
RESULT = re.compile(r"(ok|not ok)(?:\s+(\d{1,18}))?(?![^\s-])\s*(.*)")
DIRECTIVE = re.compile(r"(?:(.*)\s)?#\s*(?:(SKIP)(?:PED)?|(TODO|XFAIL|XPASS|TIMEOUT|ERROR))\b:?\s*(.*)", re.I)
# What the runner of kselftest adds.
EXIT = re.compile(r"(.*)\s#\s*(exit=\d{1,3}.*)")
# So many results a program of kselftest has counted; it may have printed none of them (ksft_print_cnts of kselftest.h).
TOTALS = re.compile(r"# Totals: pass:(\d{1,9}) fail:(\d{1,9}) xfail:(\d{1,9}) xpass:(\d{1,9}) skip:(\d{1,9}) error:(\d{1,9})")
BAIL_OUT = re.compile(r"Bail out!\s*(.*)", re.I)
# Behind these nothing is a result any more: the kernel has given up, or was told to end.
END = re.compile(r"Kernel panic - not syncing|reboot: System halted|List of all partitions:")
# The runner of kselftest puts this before what a test program says.
QUOTE = "# "
NOTHING = "it says nothing of any test: expected lines like 'ok 1 name', in KTAP or TAP"


@dataclass(frozen=True, slots=True)
class KtapResult:
    """One test's result; `path` are its names, those of the tests that it is a part of first.

    `reason` is what its directive says (SKIP, TODO, XFAIL, TIMEOUT...); `said` what was printed next to the result, the last lines.
    """

    path: tuple[str, ...]
    outcome: Outcome
    reason: str = ""
    said: str = ""

    @property
    def name(self) -> str:
        """Its whole name: `suite / case`."""
        return " / ".join(self.path)


@dataclass(frozen=True, slots=True)
class KtapReport:
    """All that a text says of tests: the results, in order, and what is wrong with the text as a whole, in words.

    `results` are those of the tests that have no parts; one with parts has a result of its own where it failed and no part did.
    `skipped`: why nothing was run, where the text says so (`1..0 # SKIP`).
    """

    results: tuple[KtapResult, ...] = ()
    problems: tuple[str, ...] = ()
    skipped: str | None = None

    @property
    def ok(self) -> bool:
        """Whether no test failed and nothing is missing."""
        return not self.problems and not any(result.outcome == "failed" for result in self.results)

    def __getitem__(self, name: str) -> KtapResult:
        """Return the result of a test by its whole name, `suite / case`, or its last one; raises KeyError where there is none."""
        for result in self.results:
            if name in (result.name, result.path[-1]):
                return result
        raise KeyError(f"no test {name!r}; there are: {', '.join(result.name for result in self.results[:50]) or 'none'}")


def parse_ktap(text: str | Iterable[str]) -> KtapReport:
    """Return what a text, or its lines, say of tests; a text that says nothing of any has a problem that says so."""
    parser = _Parser()
    for line in text.splitlines() if isinstance(text, str) else text:
        parser.read(line)
    return parser.report()


@dataclass(slots=True)
class _Test:
    """A result line, or that of which there should have been one (`ok` is None)."""

    name: str
    ok: bool | None
    directive: str = ""
    reason: str = ""
    said: tuple[str, ...] = ()
    parts: list[_Test] = field(default_factory=list)
    # Why it counts for nothing that it is ok.
    empty: bool = False


@dataclass(slots=True)
class _Level:
    """The tests of one indentation, as far as they have come. `parts` are deeper ones, of which no test here has come yet."""

    indent: int
    name: str | None = None
    planned: int | None = None
    is_announced: bool = False
    skipped: str | None = None
    tests: list[_Test] = field(default_factory=list)
    parts: list[_Level] = field(default_factory=list)
    said: deque[str] = field(default_factory=lambda: deque(maxlen=LINES_SAID))


class _Parser:
    def __init__(self) -> None:
        self._levels = [_Level(0)]
        self._problems: list[str] = []
        self._count = 0
        self._counted = 0
        self._has_ended = False
        self._quoted_indent: int | None = None

    def read(self, line: str) -> None:
        """Take the next line."""
        text = clean_text(line[:LONGEST_LINE].rstrip("\r\n")).expandtabs(TAB)
        text = KERNEL_PREFIX.sub("", text, count=1) if text.startswith(("[", "<")) else text
        if self._has_ended or END.search(text):
            self._has_ended = True
            return
        body = text.lstrip(" ")
        indent = len(text) - len(body)
        quoted = body.removeprefix(QUOTE)
        if quoted is not body and self._is_quoted(quoted, indent):
            # Behind a quotation mark lines are indented as elsewhere.
            self._read(quoted.lstrip(" "), indent + len(body) - len(quoted.lstrip(" ")), quoted)
        else:
            self._read(body, indent, text)

    def _is_quoted(self, quoted: str, indent: int) -> bool:
        """Tell whether a diagnostic line is one of a program that has been quoted since it said its version or plan."""
        if VERSION.fullmatch(quoted) or PLAN.fullmatch(quoted):
            self._quoted_indent = indent
            return True
        found = RESULT.fullmatch(quoted.lstrip(" "))
        return self._quoted_indent == indent and (bool(found and found[2]) or SUBTEST.fullmatch(quoted.lstrip(" ")) is not None)

    def _read(self, body: str, indent: int, whole: str) -> None:
        if VERSION.fullmatch(body):
            self._announce(indent)
        elif found := PLAN.fullmatch(body):
            self._plan(indent, int(found[1]), found[2] or "")
        elif found := SUBTEST.fullmatch(body):
            if (level := self._announce(indent)) is not None:
                level.name = found[1]
        elif (found := RESULT.fullmatch(body)) and (found[2] or not found[3] or found[3][0] == "-" or self._is_announced(indent)):
            self._result(indent, found[1] == "ok", found[2] or "", found[3])
        elif found := BAIL_OUT.fullmatch(body):
            self._problem(f"it bailed out: {found[1] or 'no reason was given'}")
            self._has_ended = True
        elif found := TOTALS.fullmatch(body):
            self._counted = sum(map(int, found.groups()))
        elif whole.strip():
            self._levels[-1].said.append(whole)

    def _problem(self, what: str) -> None:
        if len(self._problems) < LINES_SAID:
            self._problems.append(what)

    def _level(self, indent: int) -> _Level | None:
        """Return the level of an indentation, new where there is none; None where that would be too deep."""
        has_closed = False
        while self._levels[-1].indent > indent:
            self._close()
            has_closed = True
        above = self._levels[-1]
        if above.indent < indent:
            if len(self._levels) == DEEPEST:
                self._problem(f"tests are nested deeper than {DEEPEST} levels: what is deeper is left out")
                return None
            self._levels.append(_Level(indent))
            if has_closed:
                # What was deeper than this, and is no part of what is above.
                self._levels[-1].parts, above.parts = above.parts, []
        return self._levels[-1]

    def _announce(self, indent: int) -> _Level | None:
        level = self._level(indent)
        if level is not None:
            level.is_announced = True
        return level

    def _is_announced(self, indent: int) -> bool:
        """Tell whether a version or a plan came before: words that begin with "ok" are a result then."""
        return any(level.indent == indent and level.is_announced for level in self._levels)

    def _plan(self, indent: int, count: int, comment: str) -> None:
        level = self._announce(indent)
        if level is None:
            return
        # Of several programs one after the other, each has its plan.
        level.planned = (level.planned or 0) + count
        if count == 0:
            level.skipped = re.sub(r"(?i)^skip\w*:?\s*", "", comment) or "it has no tests"

    def _result(self, indent: int, ok: bool, number: str, text: str) -> None:
        """Take a result line, of which TAP has those without a number too."""
        level = self._level(indent)
        self._count += 1
        if level is None or self._count > MOST_RESULTS:
            if self._count == MOST_RESULTS + 1:
                self._problem(f"there are more than {MOST_RESULTS} results: the rest is left out")
            return
        name, directive, reason = _described(text)
        test = _Test(name or f"test {number or len(level.tests) + 1}", ok, directive, reason)
        for parts in level.parts:
            _check_plan(parts, test.name, self._problem)
            test.parts += parts.tests
            test.empty |= parts.is_announced and not parts.tests
            if parts.skipped is not None:
                test.reason = test.reason or parts.skipped
            level.said.extend(parts.said)
        test.said = tuple(level.said)
        level.parts = []
        level.said.clear()
        level.tests.append(test)

    def _close(self) -> None:
        """Have the deepest level be parts of a test of the one above."""
        level = self._levels.pop()
        self._settle(level)
        self._levels[-1].parts.append(level)

    def _settle(self, level: _Level) -> None:
        """Make tests of the parts of a level for which there came no result that they are parts of."""
        parts, level.parts = level.parts, []
        for each in parts:
            if each.name is None and not level.tests:
                level.tests = each.tests
            elif each.tests or each.is_announced:
                name = each.name or "(unnamed)"
                _check_plan(each, name, self._problem)
                said = tuple(each.said)
                level.tests.append(_Test(name, None, reason="its result did not come: it was cut off", said=said, parts=each.tests))

    def report(self) -> KtapReport:
        """Return what has been read."""
        while len(self._levels) > 1:
            self._close()
        top = self._levels[0]
        last_said = tuple(top.said)
        self._settle(top)
        if top.tests and top.tests[-1].ok is False and not top.tests[-1].said:
            # TAP has what is to be said of a failure behind it.
            top.tests[-1].said = last_said
        finished = [test for test in top.tests if test.ok is not None]
        _check_plan(top, None, self._problem, len(finished) or self._counted)
        results = tuple(result for test in top.tests for result in _results(test, ()))
        skipped = top.skipped if not results else None
        if not results and skipped is None and not self._problems:
            self._problem(NOTHING)
        return KtapReport(results, tuple(self._problems), skipped)


def _described(text: str) -> tuple[str, str, str]:
    """Return the name, the directive and the reason in what is behind a result's number."""
    text = re.sub(r"^-\s*", "", text.strip())
    if (left := EXIT.fullmatch(text)) is not None:
        return left[1].strip(), "", left[2].strip()
    found = DIRECTIVE.fullmatch(text)
    # An escaped "#" begins no directive: it is not preceded by a space.
    if found is None:
        return text.replace("\\#", "#"), "", ""
    directive, reason = (found[2] or found[3]).upper(), found[4].strip()
    # Programs of kselftest say what a test is behind the directive.
    return (found[1] or "").strip().removesuffix(" -") or reason, directive, reason


def _check_plan(level: _Level, name: str | None, problem: Callable[[str], None], count: int | None = None) -> None:
    count = len(level.tests) if count is None else count
    if level.planned is None or level.planned == count:
        return
    of = f"{name}: " if name else ""
    how = "it was not finished" if count < level.planned else "they are more than were planned"
    problem(f"{of}1..{level.planned} was planned, and {count} result{'' if count == 1 else 's'} came: {how}")


def _results(test: _Test, above: tuple[str, ...]) -> Iterator[KtapResult]:
    path = (*above, test.name)
    parts = [result for part in test.parts for result in _results(part, path)]
    yield from parts
    outcome, reason = _outcome(test)
    if not parts or (outcome == "failed" and (test.ok is None or not any(part.outcome == "failed" for part in parts))):
        yield KtapResult(path, outcome, reason, "\n".join(test.said))


def _outcome(test: _Test) -> tuple[Outcome, str]:
    if test.directive == "SKIP":
        return "skipped", test.reason
    if test.directive == "XFAIL" or (test.directive == "TODO" and not test.ok):
        return "xfailed", test.reason
    if test.ok and test.directive not in ("TIMEOUT", "ERROR"):
        return ("skipped", test.reason or "it ran no tests") if test.empty else ("passed", test.reason)
    known = {"TIMEOUT": "it took too long", "ERROR": "an error of the test itself"}.get(test.directive)
    return "failed", ": ".join(each for each in (known, test.reason) if each)

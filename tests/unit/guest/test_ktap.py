"""KTAP and TAP as programs print them, and as nobody would."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_chvm.guest.ktap import DEEPEST, MOST_RESULTS, parse_ktap


def outcomes(text):
    return [(result.name, result.outcome) for result in parse_ktap(text).results]


KUNIT = """\
[    0.060000][    T1] random: get_random_bytes called with crng_init=0
[    0.060000][    T1] TAP version 14
[    0.060000][    T1] 1..2
[    0.060000][    T1] \t# Subtest: resource
[    0.060000][    T1] \t1..2
[    0.060000][    T1] \tok 1 - init
[    0.060000][    T1]  foo bar \t#
[    0.060000][    T1] \t# alloc: EXPECTATION FAILED at lib/x.c:12
[    0.060000][    T1] \tnot ok 2 - alloc
[    0.060000][    T1] not ok 1 - resource
[    0.060000][    T1] \t# Subtest: example
[    0.060000][    T1] \t1..1
[    0.060000][    T1] \tok 1 - skipped # SKIP this should be
[    0.060000][    T1] ok 2 - example
[    0.060000][    T1] List of all partitions:
[    0.060000][    T1] not ok 3 no result any more
"""
KSELFTEST = """\
TAP version 13
1..2
# selftests: membarrier: single
# TAP version 13
# 1..2
# ok 1 available
# # a remark of the program
# ok 2 invalid command: flags = 0. Failed as expected
# # Totals: pass:2 fail:0
ok 1 selftests: membarrier: single
# selftests: membarrier: multi
# TAP version 13
# 1..1
# not ok 1 available
not ok 2 selftests: membarrier: multi # exit=1
"""


def test_a_boot_of_kunit_has_its_cases_by_suite_with_what_the_failed_one_said():
    report = parse_ktap(KUNIT)
    assert outcomes(KUNIT) == [("resource / init", "passed"), ("resource / alloc", "failed"), ("example / skipped", "skipped")]
    assert "EXPECTATION FAILED at lib/x.c:12" in report["alloc"].said
    assert report["skipped"].reason == "this should be"
    assert not report.problems
    assert not report.ok


def test_what_the_runner_of_kselftest_quotes_are_parts_of_the_program_that_said_it():
    assert outcomes(KSELFTEST) == [
        ("selftests: membarrier: single / available", "passed"),
        ("selftests: membarrier: single / invalid command: flags = 0. Failed as expected", "passed"),
        ("selftests: membarrier: multi / available", "failed"),
    ]
    assert not parse_ktap(KSELFTEST).problems


def test_quoted_words_like_a_result_are_none_where_nobody_began_a_test():
    assert outcomes("1..1\n# ok 1 of what I say\nok 1 real") == [("real", "passed")]


@pytest.mark.parametrize(
    ("line", "name", "outcome", "reason"),
    [
        ("ok 1 plain", "plain", "passed", ""),
        ("ok", "test 1", "passed", ""),
        ("ok - no number", "no number", "passed", ""),
        ("not ok 1", "test 1", "failed", ""),
        ("ok 1 # SKIP need root", "need root", "skipped", "need root"),
        ("ok 1 - thing # skip: need root", "thing", "skipped", "need root"),
        ("not ok 1 thing # SKIP need root", "thing", "skipped", "need root"),
        ("ok 1 thing # Skipped", "thing", "skipped", ""),
        ("not ok 1 thing # TODO later", "thing", "xfailed", "later"),
        ("ok 1 thing # TODO later", "thing", "passed", "later"),
        ("ok 1 # XFAIL known bug", "known bug", "xfailed", "known bug"),
        ("not ok 1 thing # XFAIL", "thing", "xfailed", ""),
        ("not ok 1 thing # TIMEOUT 45 seconds", "thing", "failed", "it took too long: 45 seconds"),
        ("not ok 1 thing # exit=1", "thing", "failed", "exit=1"),
        ("ok 1 - #5 of many", "#5 of many", "passed", ""),
        (r"ok 1 - a \# SKIP that is a name", "a # SKIP that is a name", "passed", ""),
        ("ok 1 - first # 2 # SKIP third", "first # 2", "skipped", "third"),
        ("ok 1 thing # skippers are no directive", "thing # skippers are no directive", "passed", ""),
        ("[   12.345] ok 1 from the log", "from the log", "passed", ""),
        ("TAP version 13\nok then a name", "then a name", "passed", ""),
        ("ok 1 bell\x07 \x1b[31mred\x1b[0m", "bell\ufffd red", "passed", ""),
    ],
)
def test_a_result_line(line, name, outcome, reason):
    (result,) = parse_ktap(line).results
    assert (result.name, result.outcome, result.reason) == (name, outcome, reason)


@pytest.mark.parametrize("line", ["okay 1 x", "ok1 x", "not okay", "notok 1", "ok then, here we go", "OK 1 x", "1..", "..3"])
def test_what_only_looks_like_a_result_is_none(line):
    assert outcomes(line) == []
    assert parse_ktap(line).problems[0].startswith("it says nothing of any test")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1..3\nok 1 a\nok 2 b", "1..3 was planned, and 2 results came: it was not finished"),
        ("ok 1 a\n1..2", "1..2 was planned, and 1 result came: it was not finished"),
        ("1..1\nok 1 a\nok 2 b", "1..1 was planned, and 2 results came: they are more than were planned"),
        ("1..1\n  1..2\n  ok 1 x\nok 1 a", "a: 1..2 was planned, and 1 result came: it was not finished"),
        ("1..2\nok 1 a\nBail out! no disk", "it bailed out: no disk"),
        ("1..2\nok 1 a\nKernel panic - not syncing: oh\nok 2 b", "1..2 was planned, and 1 result came: it was not finished"),
        (
            "1..3\n# Totals: pass:1 fail:0 xfail:0 xpass:0 skip:1 error:0",
            "1..3 was planned, and 2 results came: it was not finished",
        ),
        ("KTAP version 1\n1..2", "1..2 was planned, and 0 results came: it was not finished"),
        ("KTAP version 1", "it says nothing of any test: expected lines like 'ok 1 name', in KTAP or TAP"),
        ("", "it says nothing of any test: expected lines like 'ok 1 name', in KTAP or TAP"),
    ],
)
def test_what_is_missing_is_told(text, problem):
    report = parse_ktap(text)
    assert problem in report.problems
    assert not report.ok


def test_a_suite_that_was_cut_off_has_failed_and_what_it_had_done_counts():
    text = "KTAP version 1\n1..2\n    KTAP version 1\n    # Subtest: suite\n    1..3\n    ok 1 a\n    # b: begins"
    report = parse_ktap(text)
    assert outcomes(text) == [("suite / a", "passed"), ("suite", "failed")]
    assert report["suite"].reason == "its result did not come: it was cut off"
    assert report.problems == (
        "suite: 1..3 was planned, and 1 result came: it was not finished",
        "1..2 was planned, and 0 results came: it was not finished",
    )


def test_nothing_to_run_is_a_skip_with_its_reason():
    assert parse_ktap("TAP version 13\n1..0 # SKIP no such hardware").skipped == "no such hardware"
    assert parse_ktap("TAP version 13\n1..0 # SKIP no such hardware").ok
    assert outcomes("1..1\n  # Subtest: empty\n  1..0\nok 1 empty") == [("empty", "skipped")]


def test_a_test_that_failed_of_itself_has_a_result_though_its_parts_passed():
    text = "1..1\n  1..1\n  ok 1 part\nnot ok 1 whole # its clean-up"
    assert outcomes(text) == [("whole # its clean-up / part", "passed"), ("whole # its clean-up", "failed")]


def test_parts_whose_own_level_says_nothing_are_parts_of_the_next_test_that_does():
    text = "KTAP version 1\n1..2\nnot ok 1 first\n    KTAP version 1\n    1..1\n        not ok 1 deep\nnot ok 2 second\n"
    assert outcomes(text) == [("first", "failed"), ("second / deep", "failed")]
    assert not parse_ktap(text).problems


def test_parameters_of_a_case_are_told_apart():
    text = (
        "KTAP version 1\n1..1\n    KTAP version 1\n    # Subtest: suite\n    1..1\n        KTAP version 1\n"
        "        # Subtest: case\n        ok 1 one\n        not ok 2 two\n    not ok 1 case\nnot ok 1 suite\n"
    )
    assert outcomes(text) == [("suite / case / one", "passed"), ("suite / case / two", "failed")]


def test_two_programs_one_after_the_other_have_all_their_results():
    assert not parse_ktap("TAP version 13\n1..1\nok 1 a\nTAP version 13\n1..2\nok 1 b\nok 2 c").problems


def test_a_hostile_text_is_bounded():
    deep = "\n".join(" " * depth + "ok 1 x" for depth in range(200))
    report = parse_ktap(deep)
    assert any(f"deeper than {DEEPEST} levels" in problem for problem in report.problems)
    many = parse_ktap("ok 1 x\n" * (MOST_RESULTS + 100))
    assert len(many.results) == MOST_RESULTS
    assert len(many.problems) == 1
    assert len(parse_ktap("ok 1 " + "x" * (1 << 20)).results[0].name) < 5000
    assert parse_ktap("1..999999999\nok 1 a").problems


LINES = st.one_of(
    st.sampled_from(
        ["KTAP version 1", "1..2", "1..0 # SKIP x", "# Subtest: s", "ok 1 a", "not ok 2 - b", "ok 3 # SKIP", "Bail out!", "# said"]
    ),
    st.text(max_size=20),
)


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["", "# ", "[ 1.2] ", "\t"]), LINES), max_size=60))
def test_no_text_breaks_it_and_a_failed_result_is_never_lost(lines):
    text = "\n".join(
        f"{prefix if prefix != '# ' else ''}{' ' * indent}{prefix if prefix == '# ' else ''}{line}"
        for indent, prefix, line in lines
    )
    report = parse_ktap(text)
    assert len(report.results) <= 3 * len(text.splitlines()) + 1
    if not report.ok:
        assert report.problems or any(result.outcome == "failed" for result in report.results)


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(0, 20))
def test_a_text_cut_anywhere_is_not_taken_for_a_whole_one(oks, cut):
    lines = [
        "KTAP version 1",
        f"1..{len(oks)}",
        *(f"{'ok' if ok else 'not ok'} {number} t{number}" for number, ok in enumerate(oks, 1)),
    ]
    shortened = lines[: max(2, len(lines) - cut)]
    report = parse_ktap("\n".join(shortened))
    assert report.ok == (all(oks) and len(shortened) == len(lines))
    assert [result.outcome == "passed" for result in report.results] == oks[: len(shortened) - 2]

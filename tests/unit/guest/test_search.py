"""What is looked for on a console, however its text comes."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_chvm.guest import ready, search
from pytest_chvm.guest.search import ConsoleSearch

PATTERNS = [
    r"^a",
    r"(?m)^a",
    r"\Ab",
    r"\ba",
    r"a\b.",
    r"\Ba",
    r"(?<=b)a",
    r"(?<!b)a",
    r"(?<!b\n)aé",
    r"(?<=\nb)a",
    r"a\n{1,9}b",
    r"é",
    r"\ufffd\n",
    r"(?s)a.{0,5}b",
    r"(a)é\1",
]


@pytest.fixture
def small(monkeypatch):
    """Windows of a few bytes, so that every text is larger."""
    monkeypatch.setattr(search, "WINDOW", 16)
    monkeypatch.setattr(search, "BEFORE", 8)
    monkeypatch.setattr(ready, "CHUNK", 10)


def grown(log, data, cuts):
    """Write a log piece by piece, and yield after each."""
    cuts = sorted({min(cut, len(data)) for cut in cuts})
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        with log.open("ab") as file:
            file.write(data[start:end])
        yield


@given(
    st.lists(st.sampled_from([b"a", b"b", b"\n", b"a\xc3\xa9", b" ", b"\xc3", b"\xa9"]), min_size=30, max_size=60).map(b"".join),
    st.lists(st.integers(0, 80), max_size=8),
    st.sampled_from(PATTERNS),
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_match_is_found_where_the_whole_text_has_one(small, tmp_path, data, cuts, pattern):
    log = tmp_path / "log"
    log.write_bytes(b"")
    # What ends with the first bytes of a character waits for its others.
    data += b"."
    looked = ConsoleSearch(log, re.compile(pattern))
    found = [looked.scan() for _time in grown(log, data, cuts)]
    assert any(found) == bool(re.search(pattern, data.decode(errors="replace")))


def test_a_match_is_found_that_spans_just_less_than_the_window(small, tmp_path):
    # The window, and the one byte that is new.
    for size, is_found in ((search.WINDOW + 1, True), (search.WINDOW + 2, False)):
        log = tmp_path / str(size)
        looked = ConsoleSearch(log, re.compile("(?s)begin.*end"))
        data = b"x" * 50 + b"begin".ljust(size - 3, b".") + b"end"
        found = [looked.scan() for _time in grown(log, data, [len(data) - 1])]
        assert bool(found[-1]) == is_found


def test_each_byte_of_a_console_is_read_once_apart_from_the_window(tmp_path, monkeypatch):
    log = Path(tmp_path / "log")
    log.write_bytes(b"")
    read, pread = [], os.pread

    def counted(fd, size, offset):
        data = pread(fd, size, offset)
        read.append(len(data))
        return data

    monkeypatch.setattr(ready.os, "pread", counted)
    looked, piece, times = ConsoleSearch(log, re.compile("never")), b"x" * 99 + b"\n", 20
    for _time in grown(log, piece * 10_000 * times, range(0, 10**6 * times, 10**6)):
        assert looked.scan() is None
    # At the end of each scan it looks whether there is more.
    assert sum(read) <= log.stat().st_size + len(read) * (search.WINDOW + search.BEFORE)
    assert len(read) <= 2 * times + log.stat().st_size // ready.CHUNK + 2

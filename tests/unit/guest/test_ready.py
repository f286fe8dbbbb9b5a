"""The serial log as it grows: the ready marker, panics, and text fit for a person."""

import ipaddress
import re
import time
import tracemalloc
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_chvm.base.text import clean, last_lines
from pytest_chvm.guest import ready
from pytest_chvm.guest.ready import LogReader, PanicScanner, ReadyScanner

same_log = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
IPS = st.ip_addresses().map(str)
NOISE = st.one_of(
    st.binary(max_size=200),
    st.text("CHVM_READY 0123456789.:nonce=\r\n\x1b[", max_size=200).map(str.encode),
    st.sampled_from([b"CHVM_READY", b"CHVM_READY ", b"CHVM_", b"CHVM_READY 10.0.0", b"login: ", b"\0" * 300]),
)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "serial.log"


def append(log, data):
    with log.open("ab") as file:
        file.write(data)


def cut(data, places):
    places = sorted({place % (len(data) + 1) for place in places})
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


@same_log
@given(
    before=NOISE,
    ip=IPS,
    after=NOISE,
    places=st.lists(st.integers(0, 1000), max_size=12),
    end=st.sampled_from([b"\n", b"\r\n", b"\r\r\n"]),
)
def test_marker_is_found_in_any_noise_however_the_log_grows(log, before, ip, after, places, end):
    log.write_bytes(b"")
    scanner = ReadyScanner(log)
    for piece in cut(before + b"\nCHVM_READY " + ip.encode() + end + after, places):
        append(log, piece)
        scanner.scan()
    # Noise may have had a whole line of its own, and then the first one counts.
    whole = re.findall(rb"(?<!\w)CHVM_READY[ \t]+([0-9a-f.:]+)\s*\n", before + b"\n")
    assert scanner.ip == str(ipaddress.ip_address(ip)) or whole


@same_log
@given(noise=st.lists(NOISE, max_size=8), places=st.lists(st.integers(0, 1500), max_size=20))
def test_however_it_is_cut_the_same_ip_is_found(log, noise, places):
    data = b"".join(noise)
    log.write_bytes(data)
    at_once = ReadyScanner(log).scan()
    log.write_bytes(b"")
    scanner = ReadyScanner(log)
    found = []
    for piece in cut(data, places):
        append(log, piece)
        found.append(scanner.scan())
    assert found[-1] == at_once
    if at_once is not None:
        ipaddress.ip_address(at_once)


@same_log
@given(IPS, st.integers(0, 80), st.integers(0, 80))
def test_marker_inside_a_longer_word_never_counts(log, ip, spaces, place):
    """Also when a read starts right at the marker, without what stands before it."""
    line = b"NOT" + b"CHVM_READY " + ip.encode() + b" " * spaces
    log.write_bytes(line[:place])
    scanner = ReadyScanner(log)
    scanner.scan()
    append(log, line[place:])
    scanner.scan()
    append(log, b"\n")
    assert scanner.scan() is None


@pytest.mark.parametrize(
    ("line", "ip"),
    [
        (b"CHVM_READY 192.0.2.7\n", "192.0.2.7"),
        (b"CHVM_READY 192.0.2.7\r\n", "192.0.2.7"),
        (b"CHVM_READY\t192.0.2.7  \r\n", "192.0.2.7"),
        (b"CHVM_READY 2001:db8::1\n", "2001:db8::1"),
        (b"CHVM_READY 2001:DB8:0:0::1\n", "2001:db8::1"),
        (b"debian login: CHVM_READY 192.0.2.7\n", "192.0.2.7"),
        (b"[    1.5] CHVM_READY 192.0.2.7\n", "192.0.2.7"),
        (b"CHVM_READY " + b"x" * 50 + b" CHVM_READY 192.0.2.7\n", "192.0.2.7"),
        (b"CHVM_READY 192.0.2.7", None),
        (b"CHVM_READY\n", None),
        (b"CHVM_READY \n192.0.2.7\n", None),
        (b"CHVM_READY 192.0.2\n", None),
        (b"CHVM_READY 192.0.2.256\n", None),
        (b"CHVM_READY 192.0.2.07\n", None),
        (b"CHVM_READY 3221225991\n", None),
        (b"CHVM_READY 192.0.2.7/24\n", "192.0.2.7"),
        (b"CHVM_READY 2001:db8::1/64\n", "2001:db8::1"),
        (b"CHVM_READY 192.0.2.7/33\n", None),
        (b"CHVM_READY 192.0.2.7/255.255.255.0\n", None),
        (b"\x1b[32mCHVM_READY 192.0.2.7\x1b[0m\r\n", "192.0.2.7"),
        (b"\x1b[0;1;38;5;208mCHVM_READY\x1b[0m 192.0.2.7\n", "192.0.2.7"),
        (b"\r\x1b[KCHVM_READY 192.0.2.7\r\n", "192.0.2.7"),
        (b"\x1b[H\x1b[JCHVM_READY 192.0.2.7\r\n", "192.0.2.7"),
        (b"\x1b[?2004hCHVM_READY 192.0.2.7\r\n", "192.0.2.7"),
        (b"\x1b(B\x1b[mCHVM_READY 192.0.2.7\x1b(B\x1b[m\r\n", "192.0.2.7"),
        (b"\x1b]0;title\x07CHVM_READY 192.0.2.7\n", "192.0.2.7"),
        (b"\x1b[mXCHVM_READY 192.0.2.7\n", None),
        (b"[32mCHVM_READY 192.0.2.7\n", None),
        (b"CHVM_READY host\n", None),
        (b"CHVM_READY192.0.2.7\n", None),
        (b"CHVM_READY_2 192.0.2.7\n", None),
        (b"XCHVM_READY 192.0.2.7\n", None),
        (b"chvm_ready 192.0.2.7\n", None),
        (b"CHVM_READY \xd9\xa1.0.0.1\n", None),
        (b"CHVM_READY 192.0.2.7" + b" " * 80 + b"\n", None),
    ],
)
def test_lines_that_count_and_lines_that_do_not(log, line, ip):
    log.write_bytes(line)
    assert ReadyScanner(log).scan() == ip


@pytest.mark.parametrize(
    ("line", "required", "ip", "refused"),
    [
        (b"CHVM_READY 192.0.2.7 nonce=mine\n", True, "192.0.2.7", None),
        (b"CHVM_READY 192.0.2.7 nonce=other\n", True, None, "the nonce of another VM"),
        (b"CHVM_READY 192.0.2.7 nonce=other\n", False, None, "the nonce of another VM"),
        (b"CHVM_READY 192.0.2.7 nonce=mine nonce=other\n", True, None, "the nonce of another VM"),
        (b"CHVM_READY 192.0.2.7\n", True, None, "no nonce"),
        (b"CHVM_READY 192.0.2.7\n", False, "192.0.2.7", None),
    ],
)
def test_nonce(log, line, required, ip, refused):
    log.write_bytes(line)
    scanner = ReadyScanner(log, nonce="mine", nonce_required=required)
    assert scanner.scan() == ip
    assert (scanner.refused is None) if refused is None else (refused in scanner.refused)


def test_first_line_that_counts_is_kept(log):
    log.write_bytes(b"CHVM_READY 192.0.2\nCHVM_READY 192.0.2.7\nCHVM_READY 192.0.2.8\n")
    scanner = ReadyScanner(log)
    assert scanner.scan() == "192.0.2.7"
    log.write_bytes(b"")
    assert scanner.scan() == "192.0.2.7"


def test_log_that_is_not_there_yet(log):
    scanner = ReadyScanner(log)
    assert scanner.scan() is None
    log.write_bytes(b"CHVM_READY 192.0.2.7\n")
    assert scanner.scan() == "192.0.2.7"


def test_log_that_shrank_is_read_from_its_start(log):
    log.write_bytes(b"x" * 1000)
    scanner = ReadyScanner(log)
    assert scanner.scan() is None
    log.write_bytes(b"CHVM_READY 192.0.2.7\n")
    assert scanner.scan() == "192.0.2.7"


def test_after_a_reboot_the_old_line_does_not_count_and_the_new_one_does(log):
    log.write_bytes(b"CHVM_READY 192.0.2.7\n")
    scanner = ReadyScanner(log)
    assert scanner.scan() == "192.0.2.7"
    scanner.expect_again(None)
    assert scanner.scan() is None
    append(log, b"rebooting\n")
    assert scanner.scan() is None
    append(log, b"CHVM_READY 192.0.2.8\n")
    assert scanner.scan() == "192.0.2.8"


def test_after_a_reboot_that_truncates_the_log(log):
    log.write_bytes(b"x" * 100 + b"CHVM_READY 192.0.2.7\n")
    scanner = ReadyScanner(log)
    scanner.scan()
    scanner.expect_again(None)
    log.write_bytes(b"CHVM_READY 192.0.2.8\n")
    assert scanner.scan() == "192.0.2.8"


def test_after_a_reboot_an_image_that_knows_no_nonce_is_ready_too(log):
    log.write_bytes(b"CHVM_READY 192.0.2.7\nCHVM_READY 192.0.2.8 nonce=mine\n")
    scanner = ReadyScanner(log, nonce="mine", nonce_required=True)
    assert scanner.scan() == "192.0.2.8"
    scanner.expect_again(None)
    append(log, b"CHVM_READY 192.0.2.9\n")
    assert scanner.scan() == "192.0.2.9"


def test_each_scan_reads_what_is_new_and_the_overlap_only(log, monkeypatch):
    log.write_bytes(b"x" * 3_000_000)
    scanner = ReadyScanner(log)
    scanner.scan()
    read = []
    pread = ready.os.pread
    monkeypatch.setattr(ready.os, "pread", lambda fd, size, offset: read.append(pread(fd, size, offset)) or read[-1])
    append(log, b"y" * 100)
    scanner.scan()
    scanner.scan()
    overlap = len("CHVM_READY") + 64
    assert max(map(len, read)) <= 100 + overlap + 8


@pytest.mark.parametrize(
    ("filler", "size_mb"),
    [(b"x", 100), (b"\0", 100), (b"\r", 100), (b"CHVM_READY ", 10), (b"CHVM_READY\r", 10), (b"CHVM_READY 10.0.0.1 ", 10)],
)
def test_log_that_grows_by_megabytes_takes_bounded_time_and_memory(log, filler, size_mb):
    """Those with markers are what a guest would print to keep the host busy."""
    piece = (filler * (1 << 20))[: 1 << 20]
    with log.open("wb") as file:
        for _time in range(size_mb):
            file.write(piece)
        file.write(b"." * 80 + b"\nCHVM_READY 192.0.2.7\n")
    tracemalloc.start()
    started = time.process_time()
    try:
        assert ReadyScanner(log).scan() == "192.0.2.7"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 10
    assert peak < 12 << 20


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"Kernel panic - not syncing: Attempted to kill init!\r\n", True),
        (b"[    2.345678] Kernel panic - not syncing: x\n", True),
        (b"boot\r\n[ 12.3] Kernel panic - not syncing: x\n", True),
        (b"[    1.234567][    T1] Kernel panic - not syncing: x\n", True),
        (b"[    1.234567][    C0] Kernel panic - not syncing: x\n", True),
        (b"[    T1] Kernel panic - not syncing: x\n", True),
        (b"host login: [   12.345678] Kernel panic - not syncing: x\r\n", True),
        (b"<0>[    1.234567] Kernel panic - not syncing: x\n", True),
        (b"<0>Kernel panic - not syncing: x\n", True),
        (b'user said "Kernel panic - not syncing: x"\n', False),
        (b"echo Kernel panic - not syncing\n", False),
    ],
)
def test_panic(log, text, found):
    log.write_bytes(text)
    panic = PanicScanner(log).scan()
    assert (panic is not None) is found
    assert panic is None or panic.startswith("Kernel panic - not syncing: ")


def test_what_failed_is_said_before_the_address(log):
    log.write_bytes(
        b"CHVM_READY failed=share0 nonce=mine\nCHVM_READY failed=share0 nonce=mine\nCHVM_READY failed=nic1 nonce=mine\n"
        b"CHVM_READY failed=share2 nonce=other\nCHVM_READY failed=rm nonce=mine\nCHVM_READY failed=share1234 nonce=mine\n"
        b"CHVM_READY 192.0.2.7 nonce=mine\n"
    )
    scanner = ReadyScanner(log, nonce="mine", nonce_required=True)
    assert scanner.scan() == "192.0.2.7"
    assert scanner.failed == ("share0", "nic1")
    scanner.expect_again("mine")
    append(log, b"CHVM_READY 192.0.2.7 nonce=mine\n")
    assert scanner.scan() == "192.0.2.7"
    assert scanner.failed == ()


def test_what_failed_is_bounded(log):
    log.write_bytes(b"".join(b"CHVM_READY failed=share%d\n" % number for number in range(999)) + b"CHVM_READY 192.0.2.7\n")
    scanner = ReadyScanner(log)
    scanner.scan()
    assert len(scanner.failed) == ready.MOST_FAILED


@pytest.mark.parametrize("place", range(0, 60, 7))
def test_panic_that_is_split_between_two_reads(log, place):
    text = b"ok\n[    2.345678] Kernel panic - not syncing: Attempted to kill init!\n"
    log.write_bytes(text[:place])
    scanner = PanicScanner(log)
    scanner.scan()
    append(log, text[place:])
    assert scanner.scan().startswith("Kernel panic")


def bad(character):
    return character not in "\n\t" and (unicodedata.category(character) in ("Cc", "Cs") or 0x202A <= ord(character) <= 0x202E)


ESCAPES = st.lists(
    st.sampled_from(
        [
            b"\x1b",
            b"[",
            b"]",
            b"0;",
            b"31m",
            b"\x07",
            b"\x9b",
            b"P",
            b"\\",
            b"\r",
            b"\n",
            b"\xc2\x9b",
            b"a",
            b"\xff",
            b"\xe2\x80\xae",
        ]
    ),
    max_size=40,
).map(b"".join)


@given(st.one_of(st.binary(max_size=400), ESCAPES, st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))))
@settings(max_examples=500, deadline=None)
def test_cleaned_text_has_no_control_character_and_no_escape(raw):
    text = clean(raw)
    assert not [character for character in text if bad(character)]
    text.encode()


def test_cleaning_keeps_what_a_person_reads():
    assert clean("größe\t1\r\n\x1b[1;31mred\x1b[0m\x1b]0;title\x07 end".encode()) == "größe\t1\nred end"


@given(st.binary(max_size=2000))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_last_lines_are_clean_and_bounded(log, raw):
    log.write_bytes(raw * 30)
    text = last_lines(log, count=5)
    assert len(text.splitlines()) <= 5 or "\x85" in text or "\u2028" in text or "\u2029" in text
    assert len(text) <= 5 * 201
    assert not [character for character in text if bad(character)]


def test_last_lines_of_a_huge_log_are_read_from_its_end(log):
    log.write_bytes(b"x" * 50_000_000 + b"\nlast\n")
    started = time.process_time()
    assert last_lines(log).endswith("last")
    assert time.process_time() - started < 1


def test_log_reader_never_yields_more_than_a_chunk(log):
    log.write_bytes(b"x" * (3 * ready.CHUNK + 5))
    pieces = list(LogReader(log, 100).pieces())
    assert max(map(len, pieces)) <= ready.CHUNK + 100
    assert len(pieces) == 4


def test_a_panic_that_comes_in_pieces_is_told_whole(log):
    scanner = PanicScanner(log)
    for piece in (b"\n[    2.1] Kernel panic", b" - not syncing: ", b"sysrq triggered "):
        with log.open("ab") as file:
            file.write(piece)
        assert scanner.scan() is None
    with log.open("ab") as file:
        file.write(b"crash\r\n")
    assert scanner.scan() == "Kernel panic - not syncing: sysrq triggered crash"


def test_a_panic_without_an_end_is_told_in_part(log):
    log.write_bytes(b"\nKernel panic - not syncing: " + b"x" * 500)
    assert PanicScanner(log).scan() == "Kernel panic - not syncing: " + "x" * 200

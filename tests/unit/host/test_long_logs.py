"""Logs that grow without end: the keeper drops their middle, and whoever reads them goes on."""

import os
import re
import subprocess
import sys

import pytest

from pytest_chvm.base.deadline import Deadline
from pytest_chvm.base.watch import FileWatch
from pytest_chvm.drivers.events import EventReader
from pytest_chvm.guest.ready import CHUNK, LogReader, ReadyScanner
from pytest_chvm.guest.search import ConsoleSearch
from pytest_chvm.host import keeper_client
from pytest_chvm.host.host import default_host
from pytest_chvm.host.keeper import logbound
from pytest_chvm.host.leases import Lease
from pytest_chvm.report.sections import VmRecord, keep_logs

KIB, MIB = 1 << 10, 1 << 20
BOUND = (MIB, 64 * KIB, 256 * KIB)
DROPPED = rb"\n--- pytest-chvm: +\d+ KiB of this log were dropped here"
# Prints what it is asked for, and ends with its input: a megabyte of numbered lines for each line of a FIFO.
WRITER = """
import sys
for number, order in enumerate(open(sys.argv[1])):
    for line in range(1 << 14):
        sys.stdout.write(f"{number:6} {line:56}\\n")
    sys.stdout.write(f"written {number}\\n")
    sys.stdout.flush()
"""


@pytest.fixture
def lease():
    lease = Lease(default_host())
    yield lease
    assert lease.release(search=True) == []


def allocated(path):
    return path.stat().st_blocks * 512


def wait_until(log, holds):
    with FileWatch(log) as watch:
        deadline = Deadline.after(20)
        while not holds():
            assert not deadline.expired, f"{log}: {log.stat()}"
            watch.wait(deadline)


def test_the_keeper_drops_the_middle_of_what_its_programs_print(lease, monkeypatch, tmp_path):
    monkeypatch.setattr(keeper_client, "LOG_BOUND", BOUND)
    orders, log, other = tmp_path / "orders", tmp_path / "log", tmp_path / "other"
    os.mkfifo(orders)
    other.touch()
    lease.keeper.spawn([sys.executable, "-c", WRITER, str(orders)], log, lease.directory, other_logs=[other])
    search = ConsoleSearch(log, re.compile("written 7"))
    with orders.open("w") as written:
        for number in range(8):
            written.write("more\n")
            written.flush()
            wait_until(log, lambda number=number: f"written {number}\n".encode() in log.read_bytes()[-20:])
            if number == 1:
                wait_until(log, lambda: allocated(log) < MIB)
                search.scan()
        other.write_bytes(b"x" * (3 * MIB) + b"\nend\n")
        wait_until(log, lambda: allocated(log) < MIB)
        wait_until(other, lambda: allocated(other) < MIB)
    content = log.read_bytes()
    # Its length is what was written, so that offsets hold; and its first and last part are as they were.
    assert len(content) == 8 * (64 << 14) + 8 * len("written 0\n")
    assert content.startswith(b"     0 ")
    assert content[-BOUND[2] :].count(b"\0") == 0
    assert content.endswith(b"written 7\n")
    assert len(re.findall(DROPPED, content)) == 1
    assert search.scan()


@pytest.fixture
def shortened(tmp_path):
    """A log of four GiB, most of which is a hole, that says it is ready at its end."""
    log = tmp_path / "vm.serial.log"
    with log.open("wb") as file:
        file.write(b"first line\n" * (MIB // 11 + 1))
        file.seek(4 << 30)
        file.write(b"x" * MIB + b"\nCHVM_READY 192.0.2.1\n")
    assert logbound.shorten(str(log), BOUND, 0) == (4 << 30) + (MIB - BOUND[2]) // 4096 * 4096
    return log


def test_readers_pass_over_what_was_dropped(shortened):
    assert sum(map(len, LogReader(shortened, 0).pieces())) < 4 * CHUNK
    assert ReadyScanner(shortened).scan() == "192.0.2.1"


def test_a_kept_log_has_no_hole(shortened, tmp_path):
    (copy,) = keep_logs([VmRecord("vm", shortened, tmp_path / "none", tmp_path / "none", ())], tmp_path / "kept")
    content = copy.read_bytes()
    assert len(content) < MIB
    assert b"\0" not in content
    assert re.search(DROPPED, content)
    assert content.endswith(b"CHVM_READY 192.0.2.1\n")


def test_a_log_that_began_anew_is_measured_anew(shortened):
    to = logbound.shorten(str(shortened), BOUND, 0)
    assert logbound.shorten(str(shortened), BOUND, to) == to
    shortened.write_bytes(b"y" * (MIB - 1))
    assert logbound.shorten(str(shortened), BOUND, to) == 0
    with shortened.open("ab") as file:
        file.write(b"y" * MIB)
    assert logbound.shorten(str(shortened), BOUND, 0) > 0
    assert allocated(shortened) < MIB


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a file system without holes")
def test_where_there_are_no_holes_a_log_says_so_once(tmp_path):
    subprocess.run(["mount", "-t", "ramfs", "ramfs", tmp_path], check=True)
    try:
        log = tmp_path / "log"
        log.write_bytes(b"x" * (2 * MIB) + b"\n")
        logs = logbound.BoundedLogs()
        logs.add(1, [str(log)], BOUND)
        logs.check()
        assert logs.wait_ms() is None
        logs.check()
        assert log.read_bytes() == b"x" * (2 * MIB) + b"\npytest-chvm: this log cannot be bounded: Operation not supported\n"
    finally:
        subprocess.run(["umount", tmp_path], check=True)


class Names(EventReader):
    def judge(self, event):
        self.names = [*getattr(self, "names", []), event["event"]]


@pytest.mark.parametrize(
    "form", ['{{"event": "{}", "data": {{"more": {{}}}}}}\r\n', '{{\n  "event": "{}",\n  "data": {{\n  }}\n}}\n\n']
)
@pytest.mark.parametrize("read_before", [True, False])
def test_events_after_dropped_ones_are_read(tmp_path, form, read_before):
    log = tmp_path / "events"
    reader = Names("vm", log)
    with log.open("w", newline="") as file:
        file.write(form.format("first") + form.format("second")[:-5])
        file.flush()
        if read_before:
            reader.read()
        for _number in range(2 * MIB // len(form)):
            file.write(form.format("many"))
        file.write(form.format("last"))
    logbound.shorten(str(log), BOUND, 0)
    reader.read()
    assert reader.names[0] == "first"
    assert reader.names[-1] == "last"
    assert len(reader.names) < MIB // len(form)

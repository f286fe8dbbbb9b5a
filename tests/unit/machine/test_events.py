"""The event log of a VM: what is in the file is what was added, whatever the texts and however the writer ends."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pytest_chvm.errors import GuestPanicError, HypervisorError
from pytest_chvm.host.registry import shown
from pytest_chvm.machine import events
from pytest_chvm.machine.events import (
    COMMAND,
    ENDED,
    GET,
    PAUSED,
    PUT,
    READY,
    SPAWNED,
    EventLog,
    last_of,
    read_events,
    ready_after_s,
)
from pytest_chvm.report.history import how_it_started, last_events


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vm.events.jsonl"


@pytest.fixture
def log(path: Path):
    log = EventLog(path)
    yield log
    log.close()


def test_file_and_memory_have_the_same_events_in_order(log: EventLog, path: Path) -> None:
    log.add(SPAWNED, pid=7)
    log.add(COMMAND, command="true", returncode=0, duration_s=0.25)
    log.add(PAUSED)
    assert [(event.kind, dict(event.details)) for event in log.events] == [
        (SPAWNED, {"pid": 7}),
        (COMMAND, {"command": "true", "returncode": 0, "duration_s": 0.25}),
        (PAUSED, {}),
    ]
    assert read_events(path) == log.events
    assert abs(log.events[0].wall_s - time.time()) < 60
    assert log.events[0].at_s <= log.events[1].at_s <= time.clock_gettime(time.CLOCK_MONOTONIC)


def test_text_of_a_guest_cannot_reach_a_terminal_from_the_file_and_is_bounded(log: EventLog, path: Path) -> None:
    log.add(COMMAND, command="\x1b[2J\n\u202e\x9b\udcff" + "x" * 100_000)
    raw = path.read_bytes()
    assert raw.count(b"\n") == 1
    assert all(32 <= byte < 127 for byte in raw.rstrip(b"\n"))
    assert len(raw) < 2500
    (event,) = read_events(path)
    assert str(event.details["command"]).startswith("\x1b[2J\n\u202e\x9b\udcff")


def test_file_is_bounded_and_the_end_is_still_in_it(log: EventLog, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LARGEST_FILE", 10_000)
    for kind in (COMMAND, PUT, GET) * 400:
        log.add(kind, duration_s=0.0)
    log.add(ENDED, how="kill()")
    assert path.stat().st_size < 10_500
    assert read_events(path)[-1].kind == ENDED


def test_memory_is_bounded_and_has_the_first_events_and_the_latest(log: EventLog) -> None:
    log.add(SPAWNED)
    for number in range(25_000):
        log.add(COMMAND, returncode=number)
    kept = log.events
    assert len(kept) <= events.MOST_EVENTS
    assert kept[0].kind == SPAWNED
    assert kept[-1].details["returncode"] == 24_999


def test_a_writer_that_is_killed_leaves_whole_lines(path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from pytest_chvm.machine.events import EventLog\nlog = EventLog(Path(sys.argv[1]))\n"
    )
    script += "print('writes', flush=True)\nwhile True: log.add('command', command='x' * 300)"
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        while not path.stat().st_size:
            assert writer.poll() is None
        writer.send_signal(signal.SIGKILL)
    # The kernel may end a write of a killed process between two pages, so that something without a line's end may be last.
    assert len(read_events(path)) == path.read_bytes().count(b"\n")


def test_threads_lose_nothing(log: EventLog, path: Path) -> None:
    threads = [threading.Thread(target=lambda: [log.add(COMMAND, command="x" * 400) for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_events(path)) == len(log.events) == 800


def test_a_full_disk_or_no_place_is_no_error_of_the_vms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = EventLog(tmp_path / "none" / "events")
    nowhere.add(READY, ip="192.0.2.1")
    assert [event.kind for event in nowhere.events] == [READY]
    nowhere.close()

    def full(_fd: int, _line: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = EventLog(tmp_path / "events")
    monkeypatch.setattr(os, "write", full)
    log.add(READY)
    log.add(PAUSED)
    monkeypatch.undo()
    assert [event.kind for event in log.events] == [READY, PAUSED]
    log.close()


def test_a_line_of_which_the_disk_took_half_is_the_last_one(log: EventLog, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log.add(READY)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, line: write(fd, line[: len(line) // 2]))
    log.add(PAUSED)
    monkeypatch.undo()
    log.add(ENDED)
    assert [event.kind for event in log.events] == [READY, PAUSED, ENDED]
    assert [event.kind for event in read_events(path)] == [READY]
    assert path.read_bytes().count(b"\n") == 1


def test_what_json_does_not_have_and_no_encoding_has_is_shown_all_the_same(log: EventLog, path: Path) -> None:
    log.add(COMMAND, command="\ud800", returncode=0)
    log.add(PUT, source=b"bytes")
    assert len(read_events(path)) == 2
    for events_of in (log.events, read_events(path)):
        said = last_events(events_of, 2)
        said.encode()
        assert "bytes" in said
    assert shown("a\ud800b").encode().isascii() is False


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b'{"at_s": 1.0}',
        b'{"at_s": NaN, "wall_s": 1.0, "kind": "ready", "details": {}}',
        b'{"at_s": "x", "wall_s": 1.0, "kind": "ready", "details": {}}',
        b"[" * 100_000,
    ],
)
def test_lines_that_are_no_events_are_left_out(log: EventLog, path: Path, line: bytes) -> None:
    log.add(READY, ip="192.0.2.1")
    with path.open("ab") as file:
        file.write(line + b"\n")
    log.add(ENDED, how="stop()")
    assert [event.kind for event in read_events(path)] == [READY, ENDED]


def test_a_pipe_in_its_place_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is no file"):
        read_events(tmp_path / "pipe")
    log = EventLog(tmp_path / "pipe")
    log.add(READY)
    assert len(log.events) == 1


def test_ready_is_counted_from_the_start_of_the_vmm(log: EventLog) -> None:
    assert ready_after_s(log.events) is None
    log.add(SPAWNED, at_s=100.0)
    log.add(READY, at_s=102.5)
    log.add(READY, at_s=110.0)
    assert ready_after_s(log.events) == 2.5
    found = last_of(log.events, READY)
    assert found is not None
    assert found.at_s == 110.0
    assert last_of(log.events, ENDED) is None


def test_an_event_costs_less_than_a_tenth_of_a_millisecond(log: EventLog) -> None:
    best = min(_time_of_100(log) for _ in range(10))
    assert best / 100 < 1e-4


def _time_of_100(log: EventLog) -> float:
    started = time.perf_counter()
    for _ in range(100):
        log.add(COMMAND, command="cat /proc/cpuinfo", returncode=0, duration_s=0.01)
    return time.perf_counter() - started


def test_events_in_a_report_are_a_clean_line_each(log: EventLog) -> None:
    log.add(SPAWNED, at_s=100.0, vmm="qemu", pid=7, origin="a clone")
    log.add(READY, at_s=102.54, ip="192.0.2.1")
    log.add(COMMAND, at_s=103.0, command="echo \x1b[31mred\n\udcff" + "x" * 1000, returncode=3, duration_s=0.5)
    log.add(COMMAND, at_s=104.0, command="sleep 9", returncode=None, duration_s=1.0, error="CommandTimeoutError")
    log.add(ENDED, at_s=105.0, how="kill()")
    assert how_it_started(log.events) == ["a clone", "ready after 2.5 s"]
    first, *lines = last_events(log.events, 4).split("\n")
    assert first == "(1 before these)"
    assert lines[0] == "    2.5 s  ready: ip 192.0.2.1"
    assert lines[1].startswith("    3.0 s  command: returned 3 after 0.5 s: echo red ")
    assert len(lines[1]) < 250
    assert lines[2:] == ["    4.0 s  command: CommandTimeoutError after 1.0 s: sleep 9", "    5.0 s  ended: kill()"]
    assert how_it_started([]) == []


def test_what_befell_a_guest_is_told_once_for_each_time_that_it_started(log: EventLog) -> None:
    log.add_ready("192.0.2.1")
    for text in ("as its panic device says", "Kernel panic - not syncing"):
        log.add_trouble(GuestPanicError(f"VM 'v': {text}. Its console ends with:\nx", vm_name="v"), vmm_ended=False)
    log.add_ready("192.0.2.1")
    log.add_ready("192.0.2.1")
    log.add_trouble(GuestPanicError("again", vm_name="v"), vmm_ended=False)
    log.add_trouble(HypervisorError("virtiofsd ended", vm_name="v"), vmm_ended=False)
    log.add_trouble(HypervisorError("its VMM ended", vm_name="v"), vmm_ended=True)
    log.add_ended("close()")
    assert [(event.kind, *event.details.values()) for event in log.events] == [
        ("ready", "192.0.2.1"),
        ("panic", "as its panic device says"),
        ("ready", "192.0.2.1"),
        ("panic", "again"),
        ("trouble", "virtiofsd ended"),
        ("ended", "its VMM ended"),
    ]

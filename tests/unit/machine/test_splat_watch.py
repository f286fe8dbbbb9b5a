"""The watch over what a guest's kernel reports, by its console alone."""

import pytest

from pytest_chvm.machine.splats import SplatWatch


def line(number):
    return f"[    {number}.000000] WARNING: CPU: 0 PID: {number} at kernel/test.c:{number} test+0x1/0x2\n"


@pytest.fixture
def log(tmp_path):
    file = tmp_path / "serial.log"
    file.write_text("")
    return file


@pytest.fixture
def watch(log):
    return SplatWatch(log, 0, -1.0, lambda: None, lambda: False)


def say(log, number):
    with log.open("a") as file:
        file.write(line(number))


def seen(watch):
    watch.collect()
    return [(splat.title.split()[4], splat.in_boot, splat.commands) for splat in watch.take()]


def test_what_came_before_the_guest_was_ready_is_its_boots(watch, log):
    say(log, 1)
    watch.note_ready()
    say(log, 2)
    with watch.during("modprobe lkdtm"):
        say(log, 3)
    assert seen(watch) == [("1", True, ()), ("2", False, ()), ("3", False, ("modprobe lkdtm",))]


def test_a_reboot_is_a_boot_too(watch, log):
    watch.note_ready()
    say(log, 1)
    watch.start_anew()
    say(log, 2)
    watch.note_ready()
    say(log, 3)
    assert seen(watch) == [("1", False, ()), ("2", True, ()), ("3", False, ())]

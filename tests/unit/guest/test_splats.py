"""Splats are found in a kernel's log as a whole, and what only mentions one is none.

The samples are of syzkaller's `pkg/report/testdata/linux/report` (Apache 2.0): what real kernels have printed on serial consoles.
"""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_chvm.guest.kernel_log import parse_console, parse_dmesg
from pytest_chvm.guest.splats import LONGEST_SPLAT, MOST_SPLATS, find_splats, has_oops
from pytest_chvm.model.kernel_log import KernelMessage

SAMPLES = Path(__file__).parent / "samples_of_splats"


def found_in(name):
    return find_splats(parse_console((SAMPLES / f"{name}.txt").read_bytes()))


@pytest.mark.parametrize(
    ("name", "kind", "title", "last_line"),
    [
        ("kasan", "KASAN", "BUG: KASAN: ", None),
        ("kfence", "KASAN", "BUG: KFENCE: invalid free in test_double_free+0xdc/0x171", "====="),
        ("kcsan", "KCSAN", "BUG: KCSAN: data-race in e1000_clean_rx_irq+0x551/0xb10", " ====="),
        ("ubsan", "UBSAN", "UBSAN: Undefined behaviour in drivers/usb/core/devio.c:1517:25", None),
        ("lockdep", "lockdep", "[ BUG: syz-executor/31761 still has locks held! ]", None),
        ("rcu-stall", "RCU stall", "INFO: rcu_sched self-detected stall on CPU", None),
        ("hung-task", "hung task", "INFO: task syz-executor5:10045 blocked for more than 120 seconds.", None),
        ("soft-lockup", "soft lockup", "NMI watchdog: BUG: soft lockup - CPU#", None),
        ("refcount", "refcount", "refcount_t: addition on 0; use-after-free.", None),
        ("warning", "WARNING", "WARNING: [time_after(jiffies, timeout)] io_uring/io_uring.c:3026 at io_ring_exit_work+", None),
        ("bug", "BUG", "kernel BUG at net/core/skbuff.c:104!", None),
        ("gpf", "Oops", "general protection fault: 0000 [#1] SMP DEBUG_PAGEALLOC KASAN", None),
        ("oops-arm", "Oops", "", None),
    ],
)
def test_real_splats(name, kind, title, last_line):
    splat = found_in(name)[0]
    assert splat.kind == kind
    assert splat.title.startswith(title)
    assert last_line is None or splat.text.rpartition("\n")[2].startswith(last_line)


def test_a_splat_is_whole_and_what_stands_around_it_is_no_part_of_it():
    (splat,) = found_in("warning")
    assert splat.text.startswith("------------[ cut here ]------------")
    assert "Workqueue" in splat.text


WARNING = """\
[   10.000000] something before
[   10.100000] ------------[ cut here ]------------
[   10.100001] WARNING: CPU: 0 PID: 42 at kernel/foo.c:7 foo+0x1/0x20 [foo]
[   10.100002] Modules linked in: foo(O) virtio_net net_failover(E)
[   10.100003] CPU: 0 PID: 42 Comm: sh Tainted: G        W  O       6.1.0-56-cloud-amd64 #1  Debian 6.1.192-2
[   10.100004] Call Trace:
[   10.100005]  <TASK>
[   10.100006]  bar+0x2/0x30
[   10.100007]  </TASK>
[   10.100008] ---[ end trace 0000000000000000 ]---
[   10.100009] something after
"""


def test_its_taint_its_modules_and_its_time_are_read():
    (splat,) = find_splats(parse_console(WARNING.encode()))
    assert (splat.kind, splat.time_s) == ("WARNING", 10.100001)
    assert splat.taint == "Tainted: G W O"
    assert splat.modules == ("foo", "virtio_net", "net_failover")
    assert len(splat.text.splitlines()) == 9


def test_two_splats_at_once_are_two():
    assert len(find_splats(parse_console((WARNING + WARNING.replace("foo", "other")).encode()))) == 2


@pytest.mark.parametrize(
    "text",
    [
        "foo[3]: WARNING: CPU: 0 PID: 1 at x",
        "WARNING: Spectre v2 mitigation leaves CPU vulnerable",
        "rcu: INFO: all is well",
        "systemd[1]: Kernel panic - not syncing: says a unit",
        "debug: BUG",
        "BUGS: none",
        "Call Trace:",
        "------------[ cut here ]------------",
        "process 1 had an Oops: none",
    ],
)
def test_what_is_no_splat(text):
    messages = [KernelMessage(1.0, 4, 0, text), *[KernelMessage(1.0, 6, 0, "and so on")] * 10]
    assert find_splats(messages) == []


def test_an_oops_is_one_by_the_line_that_counts_it():
    assert has_oops("BUG: kernel NULL pointer dereference, address: 0000000000000000\nOops: 0002 [#1] PREEMPT SMP NOPTI")
    assert has_oops("Internal error: Oops: 96000004 [#1] SMP")
    assert has_oops("kernel BUG at drivers/misc/lkdtm/bugs.c:78!\ninvalid opcode: 0000 [#1] SMP NOPTI")
    assert has_oops("general protection fault, probably for non-canonical address 0xdead000000000100: 0000 [#1] SMP")
    assert has_oops("Internal error: Oops - BUG: 00000000f2000800 [#1] PREEMPT SMP")
    assert not has_oops("WARNING: CPU: 0 PID: 1 at oops")


def test_a_log_is_read_with_levels_facilities_and_callers():
    raw = b"<4>[    1.500000] first\n<30>[    2.000000][    T1] systemd[1]: second\n<6>no time\nrubbish\n<3>[  3.0"
    assert parse_dmesg(raw) == [
        KernelMessage(1.5, 4, 0, "first"),
        KernelMessage(2.0, 6, 3, "systemd[1]: second"),
        KernelMessage(None, 6, 0, "no time"),
        KernelMessage(None, 3, 0, "[  3.0"),
    ]


def test_what_a_program_has_begun_to_write_hides_no_message():
    (message,) = parse_console(b"login: [    1.500000] WARNING: x\r\nand a line of a program's\r\n")
    assert message == KernelMessage(1.5, None, None, "WARNING: x")


LINES = st.lists(
    st.sampled_from(
        [*WARNING.splitlines(), "[ 1.0] ====================", "[ 1.0] BUG: x", "[ 1.0] Call Trace:", "[ 1.0]  </TASK>"]
    )
)


@given(st.one_of(st.binary(), LINES.map(lambda lines: "\n".join(lines).encode())))
def test_anything_is_read_in_bounds(raw):
    for splat in find_splats([*parse_console(raw), *parse_dmesg(raw)]):
        assert splat.title.lstrip() in splat.text
        assert splat.text.count("\n") < LONGEST_SPLAT


def test_very_many_splats_and_very_long_ones_are_cut():
    assert len(find_splats(parse_console(WARNING.encode() * 100))) == MOST_SPLATS
    endless = [KernelMessage(1.0, 4, 0, "BUG: x"), *[KernelMessage(1.0, 4, 0, " f+0x1/0x2")] * 1000]
    assert len(find_splats(endless)[0].text.splitlines()) == LONGEST_SPLAT

"""A user's project whose runs come to grief: copied beside a run, never collected here.

Each test tells what it has, one line of JSON, and then does what its name says, or waits for what is done to it.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pytest_chvm import CommandTimeoutError, VmError

HERE = Path(os.environ["NEWS"]).parent
PLACE = Path(os.environ.get("PLACE", "/nonexistent"))


def tell(what, **facts):
    test = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split()[0]
    with open(os.environ["NEWS"], "w") as news:
        print(json.dumps({"what": what, "test": test, "owner": os.getpid(), **facts}), file=news)


def wait_for(name):
    """Block until the scene says so."""
    with open(HERE / name) as fifo:
        fifo.readline()


def for_ever():
    tell("waits")
    threading.Event().wait()


def facts_of(vm):
    handle = vm.handle
    stat = Path(f"/proc/{vm.pid}/stat").read_text()
    return {
        # The VMM's parent.
        "keeper": int(stat.rpartition(")")[2].split()[1]),
        "vmm": vm.pid,
        "sidecars": [sidecar.pid for sidecar in handle.sidecars],
        "taps": list(handle.taps),
        "run_dir": str(handle.run_dir),
    }


@pytest.fixture
def start(chvm_vm, chvm_network, tmp_path_factory):
    """Starts a VM with everything that a VM can leave behind: a shared dir, a TAP of its own, a NIC in a network with a bridge."""

    def start(wait=False, **arguments):
        from pytest_chvm import Tap

        arguments = {"networks": [Tap(), chvm_network()], **arguments}
        vm = chvm_vm(wait=wait, shared_dirs={"code": tmp_path_factory.mktemp("shared")}, **arguments)
        tell("started", **facts_of(vm))
        return vm

    return start


@pytest.fixture
def started(start):
    return start()


@pytest.fixture
def ready(start):
    """A VM that is ready, once the scene has done what it does."""
    vm = start(wait=True)
    wait_for("acted")
    return vm


def test_bystander(start):
    vm = start()
    wait_for("go")
    assert vm.status.state.name in ("STARTING", "RUNNING", "READY")


def test_neighbour(start):
    vm = start(wait=True)
    tell("ready")
    wait_for("go")
    assert vm.check_output("echo alive; ls /mnt") == "alive\ncode\n"


SOAK_VMS = int(os.environ.get("SOAK_VMS", "0"))
# So many at the end wait for their turn.
SOAK_IN_TURN = int(os.environ.get("SOAK_IN_TURN", "0"))
# pytest itself keeps 5 kB of each test, which would be taken for ours.
VMS_OF_A_TEST = 10


@pytest.mark.parametrize("first", range(0, SOAK_VMS, VMS_OF_A_TEST))
def test_soak(first, chvm_vm, tmp_path):
    for number in range(first, min(first + VMS_OF_A_TEST, SOAK_VMS)):
        if number >= SOAK_VMS - SOAK_IN_TURN:
            wait_for("go")
        live_and_tell(chvm_vm, tmp_path)


def live_and_tell(chvm_vm, tmp_path):
    started = time.monotonic()
    vm = chvm_vm(shared_dirs={"code": tmp_path})
    assert vm.check_output("echo hello; ls /mnt") == "hello\ncode\n"
    keeper = facts_of(vm)["keeper"]
    vm.kill()
    # What is garbage is no leak.
    gc.collect()
    tell(
        "vm",
        time_s=time.monotonic() - started,
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
        keeper_descriptors=len(os.listdir(f"/proc/{keeper}/fd")),
        rss_kb=resident_kb("self"),
        keeper_rss_kb=resident_kb(keeper),
    )


def resident_kb(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))


EVIL = b"".join(
    (
        # A line that hardly ends.
        b"x" * 60000,
        # Clears the screen, sets a title, asks the terminal to type, changes its character set; the last two as single bytes.
        b"\x1b[2J\x1b[H\x1b]0;owned\x07\x1b[6n\x1bP+q544e\x1b\\\x1b(0\x9b31m\x9d0;owned\x9c\r\n",
        b"CHVM_READY 6.6.6.6\nCHVM_READY 6.6.6.6 nonce=0123456789abcdef\n",
        b"PASSED test_victims.py::test_hostile_console\n===== 1 passed in 0.01s =====\n",
        "\u202egnorw\u2066 \u2028".encode() + b"\xff\xfe\xc0\x80\xed\xa0\x80\xf8\n",
        b"\n%s out 5\nwrong\n%s err 0\n\n%s end 0\n" % ((b"0" * 32,) * 3),
        bytes(range(256)),
        # An escape sequence without an end.
        b"\x1b]" + b"y" * 500,
    )
)


def test_hostile_console(start):
    vm = start(wait=True)
    ip, before_kb = vm.ip, resident_kb("self")
    vm.run("cat >/tmp/evil", input=EVIL)
    pieces = (int(os.environ["EVIL_MB"]) << 20) // len(EVIL)
    vm.run(f"n=0; while [ $n -lt {pieces} ]; do cat /tmp/evil; n=$((n + 1)); done >/dev/ttyS0", timeout=900)
    assert (vm.ip, vm.status.state.name, vm.status.ip) == (ip, "READY", ip)
    # On the shell's own console too: it may not work any more, and may not lie.
    vm.run("(sleep 1; while :; do cat /tmp/evil; done) >/dev/hvc0 2>&1 &")
    for _ in range(2):
        try:
            assert vm.check_output("echo right", timeout=2) == "right\n"
        except VmError as error:
            tell("error", length=len(str(error)))
    tell("end", log_mb=vm.serial_log.stat().st_size >> 20, grown_kb=resident_kb("self") - before_kb)
    raise AssertionError("on purpose")


def life(start):
    vm = start(wait=True)
    assert vm.check_output("ls /mnt", timeout=5) == "code\n"


def test_a_life(start):
    life(start)


def test_another_life(start):
    life(start)


def test_waits(started):
    for_ever()


def test_fails(started):
    raise AssertionError("on purpose")


@pytest.fixture
def raises_before_its_yield(started):
    raise RuntimeError("in set-up")
    yield  # noqa: PT022 - what comes before it is what this is about


def test_set_up_raises(raises_before_its_yield):
    pass


@pytest.fixture
def raises_in_teardown(started):
    yield
    raise RuntimeError("in teardown")


def test_teardown_raises(raises_in_teardown):
    pass


def test_pytest_exit(started):
    pytest.exit("that is all", returncode=7)


@pytest.fixture
def boots_for_ever(start):
    vm = start(cmdline="console=ttyS0")
    tell("boots")
    vm.wait_for_console("it never says this", timeout=600)


def test_waits_for_a_boot(boots_for_ever):
    pass


@pytest.fixture
def tells_of_its_teardown(started):
    yield
    tell("teardown")


def test_waits_and_has_a_teardown(tells_of_its_teardown):
    for_ever()


@pytest.fixture
def waits_in_teardown(started):
    yield
    tell("teardown")
    for_ever()


def test_waits_in_teardown(waits_in_teardown):
    pass


def test_fails_and_waits_in_teardown(waits_in_teardown):
    raise AssertionError("on purpose")


def test_ends_its_process(started):
    os._exit(3)


def test_crashes(started):
    os.kill(os.getpid(), signal.SIGSEGV)


def test_kills_itself(started):
    os.kill(os.getpid(), signal.SIGKILL)


def test_dies_and_a_child_holds_every_descriptor(started):
    # Forked, not exec'd: the keeper's socket and every lock go along.
    if (child := os.fork()) == 0:
        time.sleep(20)
        os._exit(0)
    tell("child", child=child)
    os.kill(os.getpid(), signal.SIGKILL)


def test_dies_and_a_program_lives_on(started):
    child = subprocess.Popen(["sleep", "20"], close_fds=False, start_new_session=True)
    tell("child", child=child.pid)
    os.kill(os.getpid(), signal.SIGKILL)


def test_forks_and_the_child_crashes_with_a_vm(start):
    # As pytest-forked and multiprocessing do.
    if (child := os.fork()) == 0:
        start()
        os.kill(os.getpid(), signal.SIGSEGV)
    os.waitpid(child, 0)


attempts = 0


@pytest.fixture
def fails_twice(started):
    global attempts
    attempts += 1
    if attempts < 3:
        raise RuntimeError(f"attempt {attempts}")


def test_is_rerun(fails_twice):
    pass


def test_runs_a_command(ready):
    ready.check_output("echo hello", timeout=20)


def test_runs_a_command_that_times_out(ready):
    ready.check_output("sleep 0", timeout=2)


def test_looks_into_its_shared_dir(ready):
    ready.check_output("ls /mnt/code", timeout=2)


def test_asks_the_api(ready):
    ready.pause()


def test_ends_on_its_own_after_what_was_done(ready):
    pass


def test_uses_more_memory(ready):
    ready.check_output("dd if=/dev/zero of=/tmp/fill bs=1M count=64", timeout=60)


def test_powers_off(ready):
    ready.run("poweroff -f", timeout=20)


def test_reboots(ready):
    ready.run("reboot -f", timeout=20)


def test_panics(ready):
    ready.run("echo c >/proc/sysrq-trigger", timeout=20)


def test_fills_its_disk(start, tmp_path):
    disk = tmp_path / "data.raw"
    disk.write_bytes(bytes(4 << 20))
    vm = start(wait=True, data_disk=disk)
    vm.check_output("dd if=/dev/zero of=/dev/vda bs=1M", timeout=20)


def fill(directory):
    with open(directory / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError as error:
            tell("full", why=str(error))


@pytest.fixture
def full_disk():
    fill(PLACE)


def test_starts_with_a_full_disk(full_disk, start):
    start(wait=True)


def test_fills_the_disk_its_console_is_on(start):
    vm = start(wait=True)
    fill(PLACE)
    # More than QEMU and the kernel hold back.
    vm.run("seq 100000 >/dev/ttyS0", timeout=2)


def test_in_a_namespace(chvm_vm):
    vm = chvm_vm(netns="victims", wait=False)
    tell("started", **facts_of(vm))
    wait_for("acted")


def test_waits_in_a_namespace(chvm_vm):
    vm = chvm_vm(netns="victims", wait=False)
    tell("started", **facts_of(vm))
    for_ever()


def test_survives_a_command_that_hangs(ready):
    with pytest.raises(CommandTimeoutError):
        ready.run("sleep 1000", timeout=1)
    assert ready.check_output("echo on") == "on\n"


if sys.argv[0].endswith("victims.py"):
    raise SystemExit("for pytest")

"""Commands as tests give them: several at once, from threads, without a limit, long ones, and in a guest that they changed."""

import math
import os
import pty
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from pytest_chvm import CommandTimeoutError, InvalidConfigError, VmIOError
from pytest_chvm.guest.channels import Line
from pytest_chvm.guest.channels.console.shell import GuestShell


@pytest.fixture(scope="module")
def vm(chvm_vm_factory):
    """One VM for all tests that leave it as it was."""
    with chvm_vm_factory(vmm="qemu", network="none") as vm:
        yield vm


def test_a_command_that_waits_for_another_threads_command_sees_it(vm):
    with ThreadPoolExecutor(1) as executor:
        waits = executor.submit(vm.run, "until [ -e /run/flag ]; do sleep 0.1; done; echo saw; rm /run/flag", timeout=30)
        vm.check_output("touch /run/flag", timeout=20)
        assert waits.result().stdout == "saw\n"


def test_a_wait_sees_what_another_threads_check_has_taken_note_of(vm, monkeypatch):
    watched = vm.machine.health.wake_fds

    def others_meanwhile():
        monkeypatch.undo()
        vm.check_output("echo sought >/dev/ttyS0")
        vm.wait_for_console(r"sought\r\n", timeout=20)
        vm.machine.check_alive()

    def wake_fds():
        with ThreadPoolExecutor(1) as executor:
            executor.submit(others_meanwhile).result()
        return watched()

    # The moment before it waits.
    monkeypatch.setattr(vm.machine.health, "wake_fds", wake_fds)
    begun = time.monotonic()
    vm.wait_for_console("sought", timeout=30)
    assert time.monotonic() - begun < 20


def test_each_command_has_its_own_timeout_and_output(vm):
    def late():
        with pytest.raises(
            CommandTimeoutError, match=r"'echo begun; sleep 600' did not end within 0.5 s; it was killed."
        ) as caught:
            vm.run("echo begun; sleep 600", timeout=0.5)
        return caught.value.stdout

    with ThreadPoolExecutor(2) as executor:
        # Goes on while the other is killed.
        long = executor.submit(vm.run, "sleep 3; head -c 200000 /dev/zero; exit 3", timeout=30)
        assert executor.submit(late).result() == "begun\n"
        assert not long.done()
        done = long.result()
    assert (done.returncode, done.stdout_bytes) == (3, bytes(200_000))


def test_a_short_answer_does_not_wait_for_a_long_one(vm):
    size = 4_000_000
    with ThreadPoolExecutor(1) as executor:
        long = executor.submit(vm.run, f"head -c {size} /dev/zero", timeout=120)
        while not long.done():
            begun = time.monotonic()
            assert vm.check_output("cat", input="short", timeout=20) == "short"
            shortly = time.monotonic() - begun
            if not long.done():
                break
        done = long.result()
    assert len(done.stdout_bytes) == size
    assert shortly < done.duration_s


@pytest.mark.parametrize("timeout", [None, 0, math.inf, 1e7, 1e300])
def test_timeouts_that_are_no_limit(vm, timeout):
    assert vm.run("echo x", timeout=timeout).stdout == "x\n"
    assert vm.check_output("cat", input="y", timeout=timeout) == "y"


@pytest.mark.parametrize("timeout", [-1, math.nan, "60", True])
def test_timeouts_that_are_no_times(vm, timeout):
    for ask in (lambda: vm.run("true", timeout=timeout), lambda: vm.wait_for_console("x", timeout=timeout)):
        with pytest.raises(InvalidConfigError, match=r"timeout=.*expected seconds, 0 or more, or None for no limit"):
            ask()


def test_a_command_longer_than_an_argument_may_be(vm):
    text = "x'\n\\" * 50_000
    done = vm.run(f"cat <<'EOF'\n{text}\nEOF\necho $0; cat; exit 3", input="read\n", timeout=120)
    assert (done.stdout, done.returncode) == (f"{text}\nsh\nread\n", 3)
    words = ["é" * 500, "$HOME"] * 200
    assert vm.check_output(["printf", "%s\n", *words]) == "".join(f"{word}\n" for word in words)


def test_commands_of_a_guest_whose_run_directory_was_emptied(vm):
    done = vm.run("echo before; rm -rf /run/* /tmp/*; echo after; exit 3")
    assert (done.stdout, done.returncode) == ("before\nafter\n", 3)
    assert vm.check_output("cat", input="next\n") == "next\n"
    with pytest.raises(CommandTimeoutError, match=r"it was killed\.\nstdout: begun") as caught:
        vm.run("rm -rf /run; mkdir /run; echo begun; sleep 7654", timeout=1)
    assert caught.value.stdout == "begun\n"
    assert vm.run("ps | grep '[s]leep 7654'").stdout == ""
    assert vm.run(f"printf {'x' * 70_000} | wc -c").stdout == "70000\n"


def test_a_command_that_changes_the_consoles_terminal_settings(vm):
    text = "a\nb\r\n\n" * 3
    assert vm.run(f"stty -F /dev/hvc0 sane echo; printf '{text}'; seq 20000").stdout == text + "".join(
        f"{number}\n" for number in range(1, 20001)
    )
    vm.check_output("stty -F /dev/hvc0 sane echo")
    assert vm.check_output("printf 'a\\nb\\n'") == "a\nb\n"


def test_a_vm_that_is_ended_says_so_to_the_commands_of_other_threads(chvm_vm):
    vm = chvm_vm(vmm="qemu", network="none")
    with ThreadPoolExecutor(2) as executor:
        waiting = [executor.submit(vm.run, f"touch /run/{number}; sleep 600", timeout=None) for number in range(2)]
        vm.check_output("until [ -e /run/0 ] && [ -e /run/1 ]; do sleep 0.1; done", timeout=30)
        vm.stop()
        for one in waiting:
            with pytest.raises(VmIOError, match="was ended"):
                one.result(timeout=20)


SHELLS = [["dash"], ["busybox", "sh"], ["bash", "--norc"], ["bash", "--norc", "--posix"]]
# On a terminal a shell is interactive where it is given nothing to run, and has job control where that is its own terminal.
SHELLS = [[*words, *script] for words in SHELLS for script in ([], ["/dev/stdin"])]


@contextmanager
def local_shell(words):
    """A shell of the host's on a terminal, in a mount namespace without cgroups, as an older guest is."""
    ours, theirs = pty.openpty()
    ready = 'mount -t tmpfs none /sys/fs/cgroup && mount -t tmpfs none /run && exec setsid -c "$@" <&0'
    process = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", ready, "sh", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shell = GuestShell(Line("host", lambda: os.dup(ours), list, lambda: None, lambda: None, 1 << 15))
    try:
        yield lambda command, timeout=20, data=None: shell.run(command, timeout=timeout, input=data)
    finally:
        shell.close()
        os.close(ours)
        process.kill()
        process.wait()


def serves_side_by_side(run):
    with ThreadPoolExecutor(3) as executor:
        flag = threading.Event()

        def late():
            flag.set()
            with pytest.raises(CommandTimeoutError, match="it was killed") as caught:
                run("echo begun; sleep 60", timeout=1.5)
            return caught.value.stdout

        killed = executor.submit(late)
        flag.wait()
        answers = [executor.submit(run, f"cat; echo {n} >&2; exit {n}", data=b"in %d\n" % n * n) for n in range(12)]
        for number, answer in enumerate(answers):
            done = answer.result()
            assert (done.stdout, done.stderr, done.returncode) == (f"in {number}\n" * number, f"{number}\n", number)
        assert killed.result() == "begun\n"
    for data in (bytes(range(1, 129)), bytes(range(128, 256)), b" \\n%s\\c\\101 ", b"a\0b", bytes(range(256)) * 9):
        assert run("cat", data=data).stdout_bytes == data
    assert run("head -c 100000 /dev/zero").stdout_bytes == bytes(100_000)
    assert run("printf %s " + "x" * 200_000).returncode in (0, 126)


def test_any_sh_serves_commands_side_by_side():
    def serves(words):
        with local_shell(words) as run:
            serves_side_by_side(run)

    there = [words for words in SHELLS if shutil.which(words[0])]
    # All at once: most of the time of each is the timeout of a command.
    with ThreadPoolExecutor(len(there)) as executor:
        found = {" ".join(words): executor.submit(serves, words) for words in there}
    for words, outcome in found.items():
        assert outcome.exception() is None, words
    if missing := {words[0] for words in SHELLS if words not in there}:
        pytest.skip(f"not tried, not here: {', '.join(sorted(missing))}")

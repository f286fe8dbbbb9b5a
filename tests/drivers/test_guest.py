"""What a test does with a VM, in real ones: commands, files, the console, ports, pauses, reboots, and a guest that dies."""

import hashlib
import os
import re
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pytest_chvm import (
    BootFailedError,
    CommandTimeoutError,
    GuestCommandError,
    GuestPanicError,
    HypervisorError,
    InvalidConfigError,
    StopFailedError,
    UnsupportedError,
    VmIOError,
    VmState,
    VmStatus,
    launch,
)
from pytest_chvm.base.deadline import Deadline
from pytest_chvm.machine.events import read_events
from tests.conftest import AT_ONCE_S

ANY_BYTES = bytes(range(256)) * 3


@pytest.fixture(scope="module")
def vm(tmp_path_factory):
    """One VM for all tests that leave it as it was."""
    with launch(vmm="qemu", network="none", name="shared", serial_log=tmp_path_factory.mktemp("shared") / "serial.log") as vm:
        # The connection to its console is made once, and is not the first test's to have left.
        vm.check_output("true")
        yield vm


@pytest.fixture
def own_vm(tmp_path):
    """A VM of the test's own, that it may break."""
    with launch(vmm="qemu", network="none", name="own", serial_log=tmp_path / "serial.log") as vm:
        yield vm


def test_status_and_both_outputs_apart(vm):
    done = vm.run("echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert done.command == "echo out; echo err >&2; exit 3"
    assert 0 < done.duration_s < 60


@pytest.mark.parametrize(
    ("command", "status"), [("true", 0), ("false", 1), ("none-such", 127), ("kill -9 $$", 137), ("exit 255", 255)]
)
def test_exit_status_is_the_shells(vm, command, status):
    assert vm.run(command).returncode == status


@pytest.mark.parametrize("printed", ["", "no newline", "\n", "\n\n\n", "  spaces  ", "out\n\n"])
def test_nothing_is_stripped_from_outputs(vm, printed):
    done = vm.run(["printf", "%s", printed])
    assert (done.stdout, done.stderr) == (printed, "")


def test_any_bytes_come_out_and_go_in(vm):
    done = vm.run("tee /dev/stderr", input=ANY_BYTES)
    assert done.stdout_bytes == ANY_BYTES
    assert done.stderr_bytes == ANY_BYTES
    assert done.stdout.encode(errors="surrogateescape") == ANY_BYTES


def test_megabytes_of_both_outputs(vm):
    done = vm.run("head -c 3000000 /dev/zero | tr '\\0' x; head -c 1000000 /dev/zero >&2")
    assert done.stdout_bytes == b"x" * 3_000_000
    assert done.stderr_bytes == bytes(1_000_000)


def test_megabytes_of_input(vm):
    data = os.urandom(2_000_000)
    assert vm.check_output("sha256sum", input=data).split()[0] == hashlib.sha256(data).hexdigest()


def test_input_ends_where_it_ends(vm):
    assert vm.run("cat", input="text größe\n").stdout == "text größe\n"
    assert vm.run("cat").stdout == ""
    assert vm.run("cat", input="").stdout == ""


def test_input_that_is_not_read_is_not_the_next_commands(vm):
    vm.run("true", input="echo leaked\n" * 1000)
    assert vm.run("echo next; cat").stdout == "next\n"


@pytest.mark.parametrize(
    "words",
    [["printf", "%s\\n", "a b", "'", '"', "$HOME", "`id`", "*", "\\", "", "new\nline", "größe", "-n", ";"], ["echo", "\t\x01\x7f"]],
)
def test_sequence_is_one_programs_arguments(vm, words):
    expected = "".join(f"{word}\n" for word in words[2:]) if words[0] == "printf" else "\t\x01\x7f\n"
    done = vm.run(words)
    assert done.stdout == expected
    assert done.command == tuple(words)


def test_long_command(vm):
    text = "x" * 100_000
    assert vm.run(f"printf %s {text} | wc -c").stdout.strip() == "100000"


def test_command_of_many_lines(vm):
    assert vm.check_output("for n in 1 2 3\ndo\n  echo $n # 'comment\ndone\ncat <<EOF\nhere\nEOF\n") == "1\n2\n3\nhere\n"


def test_commands_do_not_see_each_others_shell(vm):
    vm.run("cd /tmp; secret=1; export secret; set -u; exit 0")
    assert vm.run("pwd; echo ${secret:-none}").stdout == "/\nnone\n"


def test_line_ends_are_not_a_terminals(vm):
    assert vm.run("printf 'a\\r\\nb\\n'").stdout_bytes == b"a\r\nb\n"


def test_check_output_shows_both_outputs_of_a_failure(vm):
    assert vm.check_output("echo fine; echo quiet >&2") == "fine\n"
    with pytest.raises(GuestCommandError) as caught:
        vm.check_output("echo half done; echo '\x1b[31mno space' >&2; exit 4")
    for part in ("'shared'", "returned 4", "half done", "no space"):
        assert part in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert caught.value.vm_name == "shared"


@pytest.mark.parametrize(
    "command", ["", [], "nul\0", ["echo", "nul\0"], b"echo"], ids=["empty", "no-words", "nul", "nul-in-words", "bytes"]
)
def test_commands_that_cannot_be(vm, command):
    if command == "":
        assert vm.run(command).returncode == 0
    else:
        with pytest.raises(InvalidConfigError):
            vm.run(command)
    assert vm.run("echo next").stdout == "next\n"


def test_timeout_names_the_command_and_keeps_what_it_printed(vm):
    started, at_once = time.monotonic(), Deadline.after(AT_ONCE_S)
    with pytest.raises(CommandTimeoutError) as caught:
        vm.run("echo so far; echo trouble >&2; sleep 600", timeout=1)
    assert time.monotonic() - started > 0.9
    assert not at_once.expired
    assert "sleep 600" in str(caught.value)
    assert "within 1 s" in str(caught.value)
    assert (caught.value.stdout, caught.value.stderr) == ("so far\n", "trouble\n")
    assert isinstance(caught.value, TimeoutError)
    assert vm.run("echo next").stdout == "next\n"


def test_timeout_kills_all_that_the_command_started(vm):
    script = """
        sleep 7771 &
        setsid sleep 7772 &
        (setsid sh -c 'trap "" TERM HUP INT; sleep 7773; sleep 7774' &)
        nohup sleep 7775 >/dev/null 2>&1 &
        trap '' TERM
        sleep 7776
    """
    with pytest.raises(CommandTimeoutError):
        vm.run(script, timeout=1)
    assert vm.run("ps -o args | grep '[7]77'").stdout == ""


def test_command_that_ends_in_time_leaves_its_daemons(vm):
    vm.run("setsid sleep 8881 >/dev/null 2>&1 </dev/null &")
    assert vm.run("kill $(ps -o pid,args | awk '/[s]leep 8881/ { print $1 }')").returncode == 0


def test_command_that_floods_until_its_timeout(vm):
    with pytest.raises(CommandTimeoutError):
        vm.run("yes | head -c 20000000; sleep 600", timeout=2)
    assert vm.run("echo next").stdout == "next\n"


def test_timeout_while_the_guest_takes_no_input(vm):
    with pytest.raises(CommandTimeoutError):
        vm.run("sleep 600", input=b"x" * 100_000, timeout=1)
    assert vm.run("echo next; cat").stdout == "next\n"


def test_answers_are_never_mixed(vm):
    def ask(number):
        if number % 7 == 3:
            with pytest.raises(CommandTimeoutError):
                vm.run(f"echo late {number}; sleep 60", timeout=0.4)
            return True
        done = vm.run(f"cat; echo {number}; echo err {number} >&2; exit {number}", input=f"in {number}\n")
        return (done.stdout, done.stderr, done.returncode) == (f"in {number}\n{number}\n", f"err {number}\n", number)

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(ask, range(16)))


def test_output_that_looks_like_the_protocol(vm):
    # A command can read all that the loop was told, but not what its own delimiters are.
    script = "printf '\\n%032d out\\n' 0; printf '\\n%032d end 0\\n' 0; cat /proc/$PPID/cmdline | tr '\\0' '\\n' | tail -c 100"
    done = vm.run(script)
    assert done.stdout.startswith(f"\n{'0' * 32} out\n\n{'0' * 32} end 0\n")
    assert vm.run("echo next").stdout == "next\n"


def test_files_go_in_and_come_out(vm, tmp_path):
    data = os.urandom(300_000)
    (tmp_path / "file").write_bytes(data)
    (tmp_path / "file").chmod(0o750)
    vm.put(tmp_path / "file", "/tmp/new/dir/copy")
    assert vm.check_output("stat -c '%a %s' /tmp/new/dir/copy").split() == ["750", "300000"]
    got = vm.get("/tmp/new/dir/copy", tmp_path / "back")
    assert got == tmp_path / "back"
    assert got.read_bytes() == data


@pytest.mark.parametrize(
    "name", ["a b", "it's", 'say "hi"', "$(reboot)", "new\nline", "-rf", "größe", os.fsdecode(b"\xff\xfe"), "a;b", "*"]
)
def test_files_of_any_name(vm, tmp_path, name):
    source = tmp_path / name
    source.write_text(name.encode(errors="surrogateescape").hex())
    vm.put(source, f"/tmp/{name}")
    assert vm.get(f"/tmp/{name}", tmp_path / "got").read_text() == source.read_text()
    vm.put(source, "/tmp/into/")
    assert vm.get(f"/tmp/into/{name}", tmp_path / "again").read_text() == source.read_text()


def test_directories_go_in_and_come_out(vm, tmp_path):
    tree = tmp_path / "tree"
    (tree / "sub" / "empty").mkdir(parents=True)
    (tree / "sub" / "file").write_text("x")
    (tree / "link").symlink_to("sub/file")
    vm.put(tree, "/tmp/tree-copy")
    (tmp_path / "out").mkdir()
    got = vm.get("/tmp/tree-copy", tmp_path / "out")
    assert got == tmp_path / "out" / "tree-copy"
    assert (got / "sub" / "file").read_text() == "x"
    assert (got / "sub" / "empty").is_dir()
    assert os.readlink(got / "link") == "sub/file"


def test_file_that_is_not_there(vm, tmp_path):
    with pytest.raises(VmIOError, match=r"'/none' could not be got from the guest: .*[Nn]o such file"):
        vm.get("/none", tmp_path)
    with pytest.raises(InvalidConfigError, match="does not exist"):
        vm.put(tmp_path / "none", "/tmp")
    with pytest.raises(VmIOError, match="could not be put"):
        vm.put(tmp_path, "/proc/none/x")


def test_waiting_for_the_console(vm):
    vm.run("(sleep 0.5; echo service up at port 42 >/dev/console) >/dev/null 2>&1 &")
    match = vm.wait_for_console(r"service up at port (\d+)\r?\n", timeout=20)
    assert match[1] == "42"
    # What is there already is found at once.
    assert vm.wait_for_console(re.compile("service up"), timeout=0.1)
    at_once = Deadline.after(AT_ONCE_S)
    with pytest.raises(VmIOError, match=r"'never printed' did not appear on the console within 0.3 s; it ends with:\n"):
        vm.wait_for_console("never printed", timeout=0.3)
    assert not at_once.expired
    assert "service up at port 42" in vm.console


def test_guest_that_prints_another_marker_does_not_change_its_ip(vm):
    vm.check_output("echo CHVM_READY 10.66.66.66 >/dev/console")
    vm.wait_for_console("10.66.66.66", timeout=20)
    assert vm.ip == "127.0.0.1"
    assert vm.status == VmStatus(VmState.READY, "127.0.0.1")


def test_vm_without_a_network(vm):
    assert vm.ip == "127.0.0.1"
    with pytest.raises(UnsupportedError, match=r"has no network: boot it with network='tap' or network='user'"):
        vm.address(80)
    assert vm.run("ls /sys/class/net").stdout.split() == ["lo"]


def test_paused_guest_stands_still_and_goes_on(vm):
    vm.check_output("rm -f /tmp/beat; (while :; do echo x >>/tmp/beat; sleep 0.05; done) >/dev/null 2>&1 & echo $! >/tmp/beat.pid")
    vm.pause()
    assert vm.status.state is VmState.PAUSED
    with pytest.raises(CommandTimeoutError):
        vm.run("true", timeout=0.5)
    vm.resume()
    assert vm.status.state is VmState.READY
    assert vm.run("echo next").stdout == "next\n"
    vm.run("kill $(cat /tmp/beat.pid)")


def test_status_attributes(vm):
    assert vm.pid == vm.handle.process.pid
    assert os.readlink(f"/proc/{vm.pid}/exe").endswith(f"qemu-system-{os.uname().machine}")
    assert vm.config.name == vm.name == "shared"
    assert vm.serial_log.exists()
    assert vm.vmm_log.exists()


def test_nonce_is_the_vms_own(vm):
    nonce = vm.handle.nonce
    assert re.fullmatch(r"[0-9a-f]{16}", nonce)
    assert f"CHVM_READY 127.0.0.1 nonce={nonce}" in vm.console


def test_panic_during_a_command_is_an_error_at_once(own_vm):
    at_once = Deadline.after(AT_ONCE_S)
    with pytest.raises(GuestPanicError, match="Kernel panic - not syncing: sysrq triggered crash") as caught:
        own_vm.run("echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; sleep 60")
    assert not at_once.expired
    assert caught.value.vm_name == "own"
    assert not isinstance(caught.value, BootFailedError)
    with pytest.raises(GuestPanicError):
        own_vm.run("true")


def test_events_say_what_has_happened_to_a_vm(own_vm):
    own_vm.run("exit 3")
    with pytest.raises(CommandTimeoutError):
        own_vm.run("sleep 60", timeout=0.2)
    own_vm.pause()
    own_vm.resume()
    with pytest.raises(GuestPanicError):
        own_vm.run("echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; sleep 60")
    # It is told once, however often it is asked for.
    with pytest.raises(GuestPanicError):
        own_vm.machine.check_alive()
    own_vm.kill()
    kinds = [event.kind for event in own_vm.events]
    assert kinds == ["spawned", "ready", "command", "command", "paused", "resumed", "panic", "command", "ended"]
    spawned, ready, failed, late, *_, panic, _, ended = own_vm.events
    assert spawned.details["pid"] == own_vm.pid
    assert 0 < ready.at_s - spawned.at_s < 60
    assert ready.details["ip"] == own_vm.ip
    assert (failed.details["command"], failed.details["returncode"]) == ("exit 3", 3)
    assert (late.details["error"], late.details["returncode"]) == ("CommandTimeoutError", None)
    # As the panic device says, where the console does not yet.
    assert re.search("sysrq triggered crash|panicked", panic.details["text"])
    assert ended.details["how"] == "kill()"
    assert read_events(own_vm.handle.event_log) == own_vm.events


def test_vmm_that_dies_during_a_command_is_an_error_at_once(own_vm, wait_ended):
    timer = threading.Timer(0.5, os.kill, (own_vm.pid, signal.SIGKILL))
    timer.start()
    at_once = Deadline.after(AT_ONCE_S)
    with pytest.raises(HypervisorError, match="was killed by signal 9, after it was ready"):
        own_vm.run("sleep 60")
    assert not at_once.expired
    timer.join()
    assert own_vm.status.state is VmState.STOPPED
    with pytest.raises(HypervisorError):
        own_vm.run("true")
    with pytest.raises(HypervisorError):
        own_vm.wait_for_console("never", timeout=60)


def test_reboot_then_shutdown(own_vm, wait_ended):
    own_vm.check_output("touch /tmp/before")
    boot_id = own_vm.check_output("cat /proc/sys/kernel/random/boot_id")
    pid = own_vm.pid
    assert own_vm.reboot() is own_vm
    assert own_vm.pid == pid
    assert own_vm.check_output("cat /proc/sys/kernel/random/boot_id") != boot_id
    assert own_vm.run("test -e /tmp/before").returncode == 1
    own_vm.shutdown()
    assert wait_ended(pid, 0)
    assert own_vm.status == VmStatus(VmState.STOPPED)
    assert "reboot: Power down" in own_vm.console or "Power down" in own_vm.console
    with pytest.raises(VmIOError, match="was ended by the test"):
        own_vm.run("true")
    # Ending it again is nobody's error.
    own_vm.stop()
    own_vm.kill()


def test_shutdown_that_the_guest_does_not_do(own_vm, wait_ended):
    own_vm.check_output("true")
    own_vm.pause()
    with pytest.raises(StopFailedError, match=r"did not power off within 1 s; its console .*\n(?s:.*)stop\(\) ends the VMM"):
        own_vm.shutdown(timeout=1)
    assert own_vm.status.state is VmState.PAUSED
    own_vm.stop()
    assert wait_ended(own_vm.pid, 0)


def test_stopped_vm_keeps_what_its_console_said(own_vm):
    own_vm.check_output("echo last words >/dev/console")
    own_vm.wait_for_console("last words", timeout=20)
    own_vm.stop()
    assert "last words" in own_vm.console
    shutil.rmtree(own_vm.serial_log.parent, ignore_errors=True)
    assert "last words" in own_vm.console

"""Commands, processes and files, with both VMMs' consoles."""

import os
import signal
import threading
import time

import pytest

from pytest_chvm import CommandTimeoutError, GuestCommandError, GuestPanicError, InvalidConfigError, UnsupportedError, VmIOError
from pytest_chvm.guest.channels import Line, open_channel

# Far less than what is waited for would take.
SOON_S = 30


def test_status_and_both_outputs_come_back_apart(vm):
    done = vm.run("echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_any_byte_passes_in_both_directions(vm):
    data = bytes(range(256)) * 4
    assert vm.run("cat", input=data).stdout_bytes == data


def test_megabytes_pass_in_both_directions(vm):
    data = os.urandom(2 << 20)
    assert vm.run("cat", input=data, timeout=120).stdout_bytes == data


def test_outputs_are_whole_however_slowly_they_are_read(vm):
    machine = vm.machine

    def late():
        threading.Event().wait(0.03)
        return machine.health.wake_fds()

    # The VM's own connects again with its next command.
    machine.channel.close()
    line = Line(
        vm.name,
        lambda: machine.driver.open_console(machine.handle),
        late,
        machine.check_alive,
        machine.health.check_ending,
        machine.driver.abilities.console_piece,
    )
    channel = open_channel(machine.guest.channel, line)
    try:
        long = channel.run("head -c 300000 /dev/zero | tr '\\0' x", timeout=60, input=None)
        assert long.stdout_bytes == b"x" * 300_000
        # Hundreds of small writes fill a console's buffers as large ones do.
        small = channel.run("yes | head -c 20000", timeout=60, input=None)
        assert small.stdout_bytes == b"y\n" * 10_000
    finally:
        channel.close()


def test_a_list_is_one_programs_arguments(vm):
    words = ["a b", "c'd", '"', "$HOME", "x\ny", "\\", "é"]
    assert vm.check_output(["printf", "%s|", *words]) == "".join(f"{word}|" for word in words)


def test_a_command_that_fails_shows_both_outputs(vm):
    with pytest.raises(GuestCommandError, match=r"(?s)returned 7.*stdout: said.*stderr: moaned") as caught:
        vm.check_output("echo said; echo moaned >&2; exit 7")
    assert (caught.value.returncode, caught.value.stdout, caught.value.stderr) == (7, "said\n", "moaned\n")


def test_a_timeout_kills_all_that_was_started_and_the_next_command_works(vm):
    with pytest.raises(CommandTimeoutError) as late:
        vm.run("echo begun; setsid sleep 997 & sleep 998", timeout=2)
    assert late.value.stdout == "begun\n"
    assert vm.run("ps | grep -c '[s]leep 99'").stdout == "0\n"


def test_a_directory_goes_in_and_comes_out_as_it_was(vm, tmp_path):
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "data").write_bytes(os.urandom(5000))
    (tree / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (tree / "run.sh").chmod(0o755)
    vm.put(tree, "/tmp/tree")
    assert vm.check_output("/tmp/tree/run.sh") == "ran\n"
    back = vm.get("/tmp/tree", tmp_path / "back")
    assert (back / "sub" / "data").read_bytes() == (tree / "sub" / "data").read_bytes()
    vm.run("rm -rf /tmp/tree")


def test_a_command_runs_in_a_directory_with_variables_as_a_user(vm):
    done = vm.run('pwd; echo "$GREETING"; id -un; echo $HOME $USER', cwd="/tmp", env={"GREETING": "it's  me\n$HOME"}, user="nobody")
    assert done.stdout == "/tmp\nit's  me\n$HOME\nnobody\n/ nobody\n"
    assert done.command == 'pwd; echo "$GREETING"; id -un; echo $HOME $USER'
    assert vm.run(["sh", "-c", "pwd; echo $A; cat; exit 4"], cwd="/mnt", env={"A": "1"}, input="in").stdout == "/mnt\n1\nin"
    assert vm.check_output("touch /tmp/his && stat -c %U /tmp/his; rm /tmp/his", user="nobody") == "nobody\n"


def test_a_command_as_a_user_may_not_do_what_root_may(vm):
    with pytest.raises(GuestCommandError, match="Permission denied"):
        vm.check_output(["ls", "/root"] if vm.run("chmod 700 /root").returncode == 0 else "", user="nobody")


@pytest.mark.parametrize("start", ["run", "popen"])
@pytest.mark.parametrize(
    ("place", "why"),
    [
        ({"cwd": "/not/there"}, r"'echo hi' was not run: cwd='/not/there' is no directory of the guest's"),
        ({"cwd": "/etc/passwd"}, r"cwd='/etc/passwd' is no directory"),
        ({"user": "mallory"}, r"'echo hi' was not run: user='mallory': the guest has no such user"),
    ],
)
def test_a_directory_or_user_that_is_not_there_is_named(vm, start, place, why):
    with pytest.raises(GuestCommandError, match=why):
        getattr(vm, start)("echo hi", **place)


@pytest.mark.parametrize("place", [{"cwd": ""}, {"cwd": 3}, {"user": "a b"}, {"user": 0}, {"env": {"a b": "c"}}, {"env": {"A": 1}}])
def test_what_cannot_be_a_place_is_refused(vm, place):
    with pytest.raises(InvalidConfigError, match=next(iter(place))):
        vm.run("true", **place)


def test_lines_come_while_the_process_runs(vm):
    with vm.popen("echo one; echo moaned >&2; while [ ! -e /tmp/go ]; do sleep 0.1; done; rm /tmp/go; echo two; exit 3") as process:
        assert process.stdout.readline(SOON_S) == "one\n"
        assert (process.poll(), process.returncode) == (None, None)
        assert process.stderr.readline(SOON_S) == "moaned\n"
        vm.check_output("touch /tmp/go")
        assert list(process.stdout) == ["two\n"]
        assert (process.wait(SOON_S), process.returncode, process.poll()) == (3, 3, 3)
        assert process.stderr.read(SOON_S) == ""


def test_a_process_has_an_input_and_a_place(vm):
    with vm.popen("cat; pwd; id -un; printf %s $A", input="in\n", cwd="/tmp", env={"A": "end"}, user="nobody") as process:
        assert list(process.stdout) == ["in\n", "/tmp\n", "nobody\n", "end"]


def test_a_signal_reaches_a_process_and_kill_ends_all_that_it_started(vm):
    with vm.popen("trap 'echo caught; exit 5' INT; echo up; while :; do sleep 0.1; done") as process:
        assert process.stdout.readline(SOON_S) == "up\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read(SOON_S).endswith("caught\n")
        assert process.wait(SOON_S) == 5
        process.send_signal(signal.SIGTERM)
    with vm.popen("setsid sleep 997 & sleep 998") as process:
        with pytest.raises(CommandTimeoutError, match=r"did not end within 0.2 s, and still runs"):
            process.wait(0.2)
        process.kill()
        assert process.wait(SOON_S) == 128 + signal.SIGKILL
        assert vm.run("ps | grep -c '[s]leep 99'").stdout == "0\n"
    with pytest.raises(InvalidConfigError, match="999"):
        process.send_signal(999)


def test_a_processs_end_of_a_block_is_its_end(vm):
    with vm.popen(["sleep", "996"]):
        pass
    assert vm.run("ps | grep -c '[s]leep 99'").stdout == "0\n"


def test_several_processes_and_commands_run_at_once_from_several_threads(vm):
    processes = [vm.popen(f"seq {number}000 {number}999") for number in range(1, 4)]
    read = {}
    threads = [
        threading.Thread(target=lambda number=number, process=process: read.update({number: list(process.stdout)}))
        for number, process in enumerate(processes, 1)
    ]
    for thread in threads:
        thread.start()
    assert [vm.check_output(f"echo {number}") for number in range(5)] == [f"{number}\n" for number in range(5)]
    for thread in threads:
        thread.join(SOON_S)
    assert read == {number: [f"{number}{line:03}\n" for line in range(1000)] for number in range(1, 4)}
    assert [process.wait(SOON_S) for process in processes] == [0, 0, 0]


def test_what_nobody_reads_waits_in_the_guest_and_commands_go_on(vm, monkeypatch):
    monkeypatch.setattr("pytest_chvm.guest.channels.console.console.LARGEST_UNREAD", 1 << 15)
    with vm.popen("seq 1 50000; echo end >&2") as process:
        for number in range(8):
            assert vm.check_output(f"echo {number}") == f"{number}\n"
        with pytest.raises(CommandTimeoutError):
            process.wait(1)
        assert len(process._process._stream.stdout) < 1 << 17
        assert [int(line) for line in process.stdout] == list(range(1, 50001))
        assert process.wait(SOON_S) == 0


def test_any_byte_comes_and_a_last_line_needs_no_end(vm):
    data = bytes(range(256)) * 300
    with vm.popen("cat", input=data) as process:
        assert process.stdout.read(SOON_S).encode(errors="surrogateescape") == data


def test_a_vm_is_not_saved_while_a_process_runs(boot):
    with boot() as vm:
        with vm.popen("sleep 600"), pytest.raises(UnsupportedError, match=r"popen\(\)"):
            vm.snapshot()
        events = [
            (event.kind, event.details.get("returncode")) for event in vm.events if event.details.get("command") == "sleep 600"
        ]
        assert events == [("popen", None), ("process ended", 137)]
        process = vm.popen("echo up; sleep 600")
        assert next(process.stdout) == "up\n"
        threading.Timer(0.5, vm.kill).start()
        begun = time.monotonic()
        # It ends with the VM.
        assert list(process.stdout) == []
        assert (process.wait(), process.poll()) == (137, 137)
        assert time.monotonic() - begun < SOON_S
    with pytest.raises(Exception, match="ended by the test"):
        vm.popen("true")


def test_a_guest_that_dies_is_told_of_at_once(boot):
    vm = boot()
    process = vm.popen("echo up; sleep 600")
    assert next(process.stdout) == "up\n"
    vm.popen("sleep 0.3; echo c >/proc/sysrq-trigger")
    with pytest.raises(Exception, match=r"gave up|panic"):
        next(process.stdout)


def test_what_is_waited_for_comes(vm):
    ready = "[ -e /tmp/here ] && cat /tmp/here"
    vm.run("(sleep 0.3; echo now >/tmp/here.new; mv /tmp/here.new /tmp/here; exec nc -l -p 4242) >/dev/null 2>&1 &")
    vm.wait_for_file("/tmp/here", SOON_S)
    done = vm.wait_until(ready, SOON_S)
    assert (done.command, done.returncode, done.stdout) == (ready, 0, "now\n")
    vm.wait_for_port(4242, SOON_S)
    assert vm.wait_until(["sh", "-c", "pwd; id -un"], cwd="/tmp", user="nobody").stdout == "/tmp\nnobody\n"
    vm.run("rm /tmp/here; kill $(pidof nc)")
    assert vm.run("ls -A /tmp | grep chvm").stdout == ""


def test_what_is_waited_for_in_vain_shows_the_last_state(vm):
    with pytest.raises(CommandTimeoutError, match=r"'echo so; echo far >&2; exit 6' did not succeed within 1 s; it returned 6"):
        vm.wait_until("echo so; echo far >&2; exit 6", timeout=1)
    with pytest.raises(CommandTimeoutError, match=r"(?s)did not even end once.*stdout: begun"):
        vm.wait_until("echo begun; sleep 600", timeout=1)
    with pytest.raises(CommandTimeoutError, match=r"nothing listens at TCP port 81 .*: none"):
        vm.wait_for_port(81, timeout=0.5)
    with pytest.raises(CommandTimeoutError, match=r"(?s)'/etc/nowhere/file' is not there after 0.5 s.* /etc\n.*passwd"):
        vm.wait_for_file("/etc/nowhere/file", timeout=0.5)
    with pytest.raises(GuestCommandError, match="user='mallory'"):
        vm.wait_until("true", timeout=1, user="mallory")
    with pytest.raises(UnsupportedError, match="systemd"):
        vm.wait_for_unit("ssh", timeout=SOON_S)
    for wait, what in ((vm.wait_for_port, 0), (vm.wait_for_port, "ssh"), (vm.wait_for_file, ""), (vm.wait_for_unit, "a b")):
        with pytest.raises(InvalidConfigError):
            wait(what, timeout=1)
    assert vm.run("ls -A /tmp | grep chvm; ps | grep -c '[s]leep 600'").stdout == "0\n"


def test_texts_and_bytes_are_written_and_read(vm):
    vm.write_text("/tmp/text", "first\nsécond\udcff\n")
    assert vm.read_bytes("/tmp/text") == "first\nsécond".encode() + b"\xff\n"
    assert vm.read_text("/tmp/text") == "first\nsécond\udcff\n"
    data = bytes(range(256)) * 100
    vm.write_bytes("/tmp/text", data)
    assert vm.read_bytes("/tmp/text") == data
    assert vm.read_text("/proc/sys/kernel/ostype") == "Linux\n"
    vm.write_text("/proc/sys/kernel/sysrq", "1")
    vm.write_bytes("/tmp/text", b"")
    assert vm.read_bytes("/tmp/text") == b""
    vm.run("rm /tmp/text")


def test_what_cannot_be_read_or_written_says_why_and_leaves_nothing(vm):
    vm.run("mkdir -p /tmp/small && mount -t tmpfs -o size=64k small /tmp/small")
    for action in (
        lambda: vm.read_text("/tmp/none"),
        lambda: vm.read_bytes("/tmp"),
        lambda: vm.write_text("/nowhere/file", "x"),
    ):
        with pytest.raises(OSError, match=r"(?i)no such file|nonexistent|is a directory"):
            action()
    with pytest.raises(VmIOError, match="No space left"):
        vm.write_bytes("/tmp/small/file", bytes(100_000))
    assert vm.check_output("ls -A /tmp/small; umount /tmp/small; rmdir /tmp/small") == ""
    with pytest.raises(InvalidConfigError, match="path"):
        vm.read_bytes("")


def test_a_large_tree_goes_both_ways_as_it_was_whatever_carries_it(vm, tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "large").write_bytes(os.urandom(1 << 20) + b"end")
    (tree / "again").hardlink_to(tree / "large")
    (tree / "sub" / "link").symlink_to("../large")
    (tree / "sub" / "run").write_text("#!/bin/sh\n")
    (tree / "sub" / "run").chmod(0o751)
    with (tree / "holes").open("wb") as holes:
        holes.write(b"first")
        holes.seek(2 << 20)
        holes.write(b"last")
        holes.truncate(3_000_001)
    os.utime(tree / "sub", (1e9, 1e9))
    # As after a reboot of a guest that it was put into.
    vm._carrier._program = "/run/gone"
    for ways in (list(vm._carrier._ways), []):
        monkeypatch.setattr(vm._carrier, "_ways", ways)
        vm.put(tree, "/tmp/tree")
        assert vm._carrier._ways == ways
        stats = vm.check_output(
            "cd /tmp/tree && stat -c '%n %a %s %h' again holes sub/run && stat -c %Y sub && du -k holes"
        ).split()
        assert " ".join(stats[:-2]) == "again 644 1048579 2 holes 644 3000001 1 sub/run 751 10 1 1000000000"
        assert int(stats[-2]) <= 16
        back = vm.get("/tmp/tree", tmp_path / f"back{len(ways)}")
        for name in ("large", "again", "holes", "sub/run"):
            assert (back / name).read_bytes() == (tree / name).read_bytes()
        assert os.readlink(back / "sub" / "link") == "../large"
        assert (back / "holes").stat().st_blocks * 512 < 1 << 20
        assert (back / "sub").stat().st_mtime == 1e9
        vm.run("rm -rf /tmp/tree")
    assert vm.run("ps | grep -c '[c]arry'").stdout == "0\n"


def test_a_large_file_for_which_there_is_no_room_leaves_nothing(vm, tmp_path):
    (tmp_path / "large").write_bytes(os.urandom(3 << 20))
    vm.run("mkdir -p /tmp/small && mount -t tmpfs -o size=1m small /tmp/small")
    with pytest.raises(VmIOError, match=r"could not be put to '/tmp/small/large' .*No space left"):
        vm.put(tmp_path / "large", "/tmp/small/large")
    assert vm.check_output("ls -A /tmp/small; umount /tmp/small; rmdir /tmp/small") == ""


def test_attributes_need_a_guest_that_keeps_them(vm, tmp_path):
    for copy in (lambda: vm.put(tmp_path, "/tmp/x", xattrs=True), lambda: vm.get("/etc", tmp_path / "x", xattrs=True)):
        with pytest.raises(UnsupportedError, match="GNU tar"):
            copy()


def test_a_guest_that_dies_ends_a_copy_at_once(boot, tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(48 << 20)
        # Not as holes.
        os.posix_fallocate(file.fileno(), 0, 48 << 20)
    vm = boot()
    vm.popen("until [ -s /tmp/.chvm.*/chvm-put ]; do sleep 0.05; done; echo c >/proc/sysrq-trigger")
    begun = time.monotonic()
    with pytest.raises(GuestPanicError):
        vm.put(tmp_path / "large", "/tmp/large", timeout=200)
    assert time.monotonic() - begun < 150

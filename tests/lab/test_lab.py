"""The lab, for real: each test that boots it does several things in it, because a boot takes seconds."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest

from pytest_chvm import lab
from pytest_chvm.base.deadline import Deadline, wait_readable
from pytest_chvm.host.kvm import why_no_kvm
from tests.conftest import AT_ONCE_S
from tests.relay import require_binary

CHVM = [sys.executable, "-m", "pytest_chvm.cli"]
# With its signals as from a terminal, whatever these tests were started by.
LAB = ["env", "--default-signal", *CHVM, "lab", "--force"]
LONGEST_RUN_S = 240


def run_lab(*words, options=(), **arguments):
    return subprocess.run([*LAB, *options, "--", *words], capture_output=True, timeout=LONGEST_RUN_S, check=False, **arguments)


def test_a_command_has_its_input_outputs_status_directory_environment_and_python(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "sys.stdout.buffer.write(sys.stdin.buffer.read())\n"
        "print(os.getcwd(), os.environ['SOME_VALUE'], sys.prefix, sys.argv[1:], file=sys.stderr)\n"
        "import pytest_chvm\n"
        "sys.exit(43)\n"
    )
    data = bytes(range(256)) * 4096
    done = run_lab(
        sys.executable,
        script,
        "a b",
        "",
        "$x\n",
        input=data,
        cwd=tmp_path,
        env={**os.environ, "SOME_VALUE": "spaces and\nnewlines"},
    )
    assert done.returncode == 43
    assert done.stdout == data
    assert done.stderr.decode() == f"{tmp_path} spaces and\nnewlines {sys.prefix} {['a b', '', '$x' + chr(10)]}\n"


def test_output_arrives_while_the_command_runs_and_input_reaches_it():
    script = "while read -r word; do echo got $word; done; kill -TERM $$"
    with subprocess.Popen([*LAB, "--", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for word in (b"one", b"two"):
            process.stdin.write(word + b"\n")
            process.stdin.flush()
            # The command waits for the next word now, so this line has not waited for its end.
            assert process.stdout.readline() == b"got " + word + b"\n"
        process.stdin.close()
        assert process.wait(LONGEST_RUN_S) == 128 + signal.SIGTERM


def test_the_host_keeps_what_is_written_below_rw_and_nothing_else(tmp_path):
    kept, untouched = tmp_path / "kept dir", tmp_path / "untouched"
    for directory in (kept, untouched):
        directory.mkdir()
        (directory / "file").write_text("before")
    script = (
        f"cd '{kept}' && echo after >file && mkdir new && mv file new/ && "
        f"cd '{untouched}' && echo after >file && touch other && cat file && "
        # Not around the layer either.
        f"mkdir /below && mount -t virtiofs root /below && ! touch '/below{untouched}/other' 2>/dev/null"
    )
    done = run_lab("sh", "-c", script, options=["--rw", kept])
    assert (done.returncode, done.stdout) == (0, b"after\n"), done.stderr
    assert (kept / "new" / "file").read_text() == "after\n"
    assert [path.name for path in untouched.iterdir()] == ["file"]
    assert (untouched / "file").read_text() == "before"


# A guest within a machine, both emulated.
@pytest.mark.timeout(360)
def test_a_guest_in_the_lab_can_share_a_rw_directory(tmp_path):
    require_binary()
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("from the host")
    (tmp_path / "test_share.py").write_text(
        "def test_share(chvm_vm):\n"
        f"    vm = chvm_vm(vmm='cloud-hypervisor', network='none', boot='cold', shared_dirs={{'kept': {str(kept)!r}}})\n"
        "    assert vm.check_output('cat /mnt/kept/file') == 'from the host'\n"
        "    vm.check_output('echo changed >/mnt/kept/file')\n"
    )
    done = run_lab(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", tmp_path, options=["--rw", kept], cwd=tmp_path)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-8000:]
    assert (kept / "file").read_text() == "changed\n"


def test_kvm_runs_a_guest_and_taps_modules_and_the_clock_work():
    script = (
        "dmesg | sed -n 's/.*tsc: .* \\([0-9]*\\)[.]\\([0-9]*\\) MHz.*/\\1\\2/p' | tail -n 1 && "
        f"{sys.executable} -IS {Path(__file__).with_name('run_guest.py')} && "
        "ip tuntap add mode tap name t0 && ip link add b0 type bridge && ip link set t0 master b0 && "
        "ip -br link show lo && date +%s.%N && "
        "modprobe dummy && grep -c ^dummy /proc/modules && "
        "grep -c ' /sys/fs/cgroup cgroup2 ' /proc/mounts && "
        "cat /sys/devices/system/clocksource/clocksource0/current_clocksource && "
        "for node in kvm net/tun vhost-vsock loop-control ptmx fd/0; do ls /dev/$node; done"
    )
    started = time.time()
    done = run_lab("sh", "-c", script)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    tsc_khz, guest_tsc_khz = lines[:2]
    # Where they differ by more than 250 ppm, a guest's timers never fire.
    assert guest_tsc_khz == tsc_khz
    assert lines[2] == "guest wrote K"
    assert re.match(r"lo +(UNKNOWN|UP) ", lines[3])
    assert started < float(lines[4]) < time.time()
    assert lines[5:8] == ["1", "1", "tsc"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["ctrl-c", "sigterm", "sigkill"])
def test_a_signal_ends_it_at_once_and_leaves_nothing(number, tmp_path):
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    script = "echo started; trap '' INT TERM; sleep 600"
    with subprocess.Popen([*LAB, "--", "sh", "-c", script], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"started\n"
        family = psutil.Process(process.pid).children(recursive=True)
        assert any("qemu" in child.name() for child in family)
        process.send_signal(number)
        status = process.wait(AT_ONCE_S)
        assert status == (-number if number == signal.SIGKILL else 128 + number)
        _gone, alive = psutil.wait_procs(family, timeout=AT_ONCE_S)
        assert alive == []
    assert list(tmp_path.iterdir()) == []


def test_the_time_limit_ends_it_with_a_status_of_its_own():
    done = run_lab("sleep", "600", options=["--timeout", "1"])
    assert done.returncode == lab.TIMED_OUT
    assert b"ended after 1 s" in done.stderr


def test_a_shell_has_a_terminal_with_the_windows_size_and_its_own_ctrl_c():
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(LAB[0], LAB, {**os.environ, "SHELL": "/bin/sh", "PS1": "ready> ", "ENV": ""})
    shell = Terminal(terminal)
    shell.resize(33, 111)
    shell.expect(b"ready> ")
    shell.type(b"stty size; tty\r")
    shell.expect(b"33 111\r\n/dev/pts/")
    # By a job of its own, which has the terminal by then.
    shell.type(b"sh -c 'echo wa\"\"iting; exec sleep 600'\r")
    shell.expect(b"waiting\r\n")
    shell.resize(44, 122)
    shell.type(b"\x03")
    shell.expect(b"ready> ")
    shell.type(b"stty size; exit 5\r")
    shell.expect(b"44 122\r\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5


class Terminal:
    """The outer end of a terminal."""

    def __init__(self, fd):
        self.fd = fd
        self.seen = b""

    def resize(self, rows, columns):
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys):
        self.seen = b""
        os.write(self.fd, keys)

    def expect(self, text, timeout_s=60):
        deadline = Deadline.after(timeout_s)
        while text not in self.seen:
            assert wait_readable([self.fd], deadline), f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self.fd, 65536)


@pytest.fixture
def streams(tmp_path):
    with open(os.devnull) as stdin, open(tmp_path / "out", "wb") as stdout, open(tmp_path / "err", "wb") as stderr:
        yield lab.Streams(stdin=stdin.fileno(), stdout=stdout.fileno(), stderr=stderr.fileno())


def test_where_kvm_works_the_command_is_run_directly_and_that_is_said(monkeypatch, streams, tmp_path):
    monkeypatch.setattr(lab, "why_no_kvm", lambda: None)
    status = lab.run(["sh", "-c", "cat /proc/sys/kernel/random/boot_id; exit 7"], streams=streams)
    assert status == 7
    assert (tmp_path / "out").read_text() == Path("/proc/sys/kernel/random/boot_id").read_text()
    assert "KVM works on this machine" in (tmp_path / "err").read_text()
    assert lab.run(["sleep", "600"], timeout=0.2, streams=streams) == lab.TIMED_OUT
    assert lab.run(["/nonexistent"], streams=streams) == 127


@pytest.mark.skipif(why_no_kvm() is None, reason="KVM works here, so that the lab is used with --force only")
def test_where_kvm_does_not_work_the_lab_is_used_unasked():
    script = "[ $(cat /proc/sys/kernel/random/boot_id) != $1 ]"
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    done = subprocess.run([*CHVM, "lab", "sh", "-c", script, "sh", boot_id], timeout=LONGEST_RUN_S, check=False)
    assert done.returncode == 0


def test_what_cannot_be_is_refused_before_anything_starts(tmp_path):
    for options, said in (
        (["--rw", tmp_path / "missing"], "is not a directory"),
        (["--memory-mb", "-5"], "expected a whole number"),
        (["--timeout", "soon"], "expected a number of seconds"),
    ):
        done = run_lab("true", options=options)
        assert done.returncode in (2, 125)
        assert said in done.stderr.decode()

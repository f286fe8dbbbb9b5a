"""A shell that ignores signals for what it starts in the background, and a machine that stands still for a while."""

import os
import select
import signal
import subprocess
import sys

import psutil
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
# As `make test &` does in a script (POSIX, "Asynchronous Lists"), and nohup.
IN_THE_BACKGROUND = ["sh", "-c", 'trap "" INT QUIT HUP; exec "$@"', "sh"]
LONGEST_RUN_S = 240


def pytest_command(*arguments):
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]


def run_project_s(tests, **options):
    """Run some of the project's own tests: all of them must pass."""
    done = subprocess.run(
        [*options.pop("started_by", []), *pytest_command(*tests)],
        cwd=ROOT, capture_output=True, text=True, timeout=LONGEST_RUN_S, check=False, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(tests)} passed" in done.stdout


def test_tests_that_send_ctrl_c_work_where_the_shell_has_it_ignored():
    run_project_s(
        [
            "tests/drivers/test_boot_failures.py::test_interrupted_wait_leaves_nothing",
        ],
        started_by=IN_THE_BACKGROUND,
    )


NEIGHBOUR = """
import sys
from pytest_chvm import launch
with launch(name="neighbour", vmm="qemu", network="none", wait=False) as vm:
    print(vm.handle.run_dir, flush=True)
    sys.stdin.readline()
"""


def test_tests_of_ps_pass_beside_a_vm_whose_run_directory_they_see(user_environment, tmp_path):
    # Too long for sockets: the run directory is below /tmp, where every sandbox sees it.
    environment = {**os.environ, "XDG_RUNTIME_DIR": os.fspath(tmp_path / ("x" * 100)), "TMPDIR": "/tmp"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", NEIGHBOUR], env=environment, **pipes) as neighbour:
        assert neighbour.stdout.readline().startswith("/tmp/pytest-chvm-")
        run_project_s(
            ["tests/plugin/test_ps_and_reap.py::test_records_that_are_none_are_reported_survived_and_cannot_reach_the_terminal"]
        )
        neighbour.communicate("\n")
    assert neighbour.returncode == 0


COMMAND_TIMEOUT_S = 4
COMMAND = f"""
import threading

def test_runs_a_command(chvm_vm):
    vm = chvm_vm(networks=[])
    # When it is waited for.
    threading.Timer(1, print, ["runs"], {{"flush": True}}).start()
    assert vm.check_output("sleep 2; echo on", timeout={COMMAND_TIMEOUT_S}) == "on\\n"
"""


@pytest.mark.slow
def test_a_machine_that_stands_still_longer_than_a_command_may_take_runs_it_all_the_same(tmp_path, user_environment):
    (tmp_path / "test_command.py").write_text(COMMAND)
    command = pytest_command("-s", tmp_path)
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while process.stdout.readline() != "runs\n":
            assert process.poll() is None
        family = stop_family(process.pid)
        try:
            assert any("qemu" in member.name() for member in family)
            select.select([], [], [], COMMAND_TIMEOUT_S + 1)
        finally:
            for member in family:
                member.send_signal(signal.SIGCONT)
        said, _ = process.communicate(timeout=LONGEST_RUN_S)
    assert process.returncode == 0, said


def stop_family(pid):
    """Stop a process and all below it, as a machine's own stop would; returns them."""
    stopped = []
    while new := [
        member for member in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)] if member not in stopped
    ]:
        for member in new:
            member.suspend()
        stopped += new
    return stopped

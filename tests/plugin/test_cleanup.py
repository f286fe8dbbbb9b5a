"""Whatever ends a test, a run or a worker: nothing of its VMs is there afterwards."""

from __future__ import annotations

import re
import signal

import pytest

from tests.leaks import Sandbox
from tests.runs import StartPytest

# A VM with everything that a VM can leave behind. It need not be ready for that.
PREAMBLE = """
    import os, pathlib, threading
    import pytest

    def tell(*words):
        with open(os.environ["NEWS"], "w") as news:
            print(*words, file=news)

    def start(chvm_vm, directory):
        return chvm_vm(wait=False, shared_dirs={"code": directory})
"""
WAITING_TEST = (
    PREAMBLE
    + """
    def test_waits(chvm_vm, chvm_network, tmp_path):
        chvm_network()
        vm = start(chvm_vm, tmp_path)
        tell(os.getpid(), vm.pid)
        threading.Event().wait()
"""
)


def test_nothing_is_left_when_tests_pass_fail_or_raise_in_set_up(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    pytester.makepyfile(
        PREAMBLE
        + """
    def test_passes(chvm_vm, chvm_network, tmp_path):
        vm = chvm_vm(shared_dirs={"code": tmp_path}, networks=[chvm_network()])
        assert vm.check_output("ls /mnt") == "code\\n"

    def test_fails(chvm_vm, tmp_path):
        start(chvm_vm, tmp_path)
        raise AssertionError("on purpose")

    @pytest.fixture
    def broken(chvm_vm, tmp_path):
        start(chvm_vm, tmp_path)
        raise RuntimeError("in set-up")

    def test_raises_in_set_up(broken):
        pass

    @pytest.fixture(scope="session")
    def broken_session(chvm_vm_factory, tmp_path_factory):
        start(chvm_vm_factory, tmp_path_factory.mktemp("shared"))
        raise RuntimeError("in set-up")

    def test_raises_in_set_up_of_a_session_fixture(broken_session):
        pass

    @pytest.fixture
    def broken_later(chvm_vm):
        yield
        raise RuntimeError("in teardown")

    def test_raises_in_teardown(broken_later, chvm_vm, tmp_path):
        start(chvm_vm, tmp_path)

    def test_nothing_is_left_of_the_tests_before(request):
        run_directories = [path for path in pathlib.Path("/run/pytest-chvm").glob("*/*") if path.is_dir()]
        # One for the session's VM.
        assert len(run_directories) == 1, run_directories
"""
    )
    run = start_pytest()
    assert run.wait(90) == 1
    assert not sandbox.left_behind()
    assert re.search(r"1 failed, 3 passed, 3 errors", run.output), run.output


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 2), (signal.SIGTERM, None), (signal.SIGKILL, -signal.SIGKILL), (signal.SIGHUP, None)],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "",
)
def test_nothing_is_left_2_s_after_a_signal_ended_the_run(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox, number: signal.Signals, status: int | None
) -> None:
    pytester.makepyfile(WAITING_TEST)
    run = start_pytest()
    _, vm_pid = run.news().split()
    assert int(vm_pid) in sandbox.left_behind(timeout_s=0).pids
    run.signal(number)
    ended = run.wait()
    assert not sandbox.left_behind()
    assert status in (None, ended), run.output


INTERRUPTED_BOOT = (
    PREAMBLE
    + """
    # Without tmp_path, whose own finalizer fails in pytest 9.2 when set-up is interrupted.
    @pytest.fixture
    def machine(chvm_vm, tmp_path_factory):
        vm = start(chvm_vm, tmp_path_factory.mktemp("shared"))
        tell("booting")
        vm.wait_for_console("it never says this")

    def test_waits(machine):
        pass
"""
)


def test_nothing_is_left_when_the_signal_arrives_while_a_fixture_boots(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    pytester.makepyfile(INTERRUPTED_BOOT)
    run = start_pytest()
    assert run.news() == "booting"
    run.signal(signal.SIGINT)
    assert run.wait() == 2
    assert not sandbox.left_behind()


def test_nothing_is_left_when_pytest_timeout_ends_the_set_up(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    pytester.makepyfile(INTERRUPTED_BOOT)
    run = start_pytest("--timeout=2")
    assert run.wait() == 1
    assert not sandbox.left_behind()
    assert "1 error" in run.output


def test_nothing_is_left_when_a_second_ctrl_c_ends_the_teardown(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    pytester.makepyfile(
        PREAMBLE
        + """
    @pytest.fixture
    def machine(chvm_vm, tmp_path_factory):
        yield start(chvm_vm, tmp_path_factory.mktemp("shared"))
        tell("in teardown")
        threading.Event().wait()

    def test_waits(machine):
        tell("in the test")
        threading.Event().wait()
"""
    )
    run = start_pytest()
    for news in ("in the test", "in teardown"):
        assert run.news() == news
        run.signal(signal.SIGINT)
    run.wait()
    assert not sandbox.left_behind()


@pytest.mark.parametrize("method", ["signal", "thread"])
def test_nothing_is_left_when_pytest_timeout_ends_the_test(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox, method: str
) -> None:
    pytester.makepyfile(WAITING_TEST)
    run = start_pytest("--timeout=2", f"--timeout-method={method}")
    run.news()
    assert run.wait() == 1
    assert not sandbox.left_behind()
    assert "Timeout" in run.output


def test_nothing_is_left_when_an_xdist_worker_is_killed(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    pytester.makepyfile(
        WAITING_TEST
        + """
    def test_after_the_worker_s_death(chvm_vm, tmp_path):
        start(chvm_vm, tmp_path)
"""
    )
    run = start_pytest("-n", "1", "--max-worker-restart=1")
    worker_pid, vm_pid = map(int, run.news().split())
    assert worker_pid != run.pid
    sandbox.run("kill", "-KILL", str(worker_pid))
    assert vm_pid not in sandbox.left_behind(but=[run.pid]).pids
    assert run.wait() == 1
    assert not sandbox.left_behind()
    assert "1 failed, 1 passed" in run.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_is_left_when_xdist_s_controller_alone_gets_a_signal(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox, number: signal.Signals
) -> None:
    pytester.makepyfile(WAITING_TEST)
    run = start_pytest("-n", "1")
    run.news()
    run.signal(number)
    run.wait(60)
    # A worker whose controller is gone ends itself, after up to 10 s.
    assert not sandbox.left_behind(timeout_s=15)


def test_what_a_killed_keeper_could_not_remove_the_next_run_removes(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    pytester.makepyfile(WAITING_TEST)
    run = start_pytest()
    run.news()
    (keeper,) = (line.split()[1] for line in sandbox.left_behind(timeout_s=0).things if "keeper.py" in line)
    sandbox.run("kill", "-KILL", keeper)
    run.signal(signal.SIGKILL)
    run.wait()
    assert not sandbox.left_behind().pids
    pytester.makepyfile(
        PREAMBLE
        + """
    def test_next(chvm_vm, tmp_path):
        start(chvm_vm, tmp_path)
"""
    )
    run = start_pytest()
    assert run.wait() == 0
    assert not sandbox.left_behind()


def test_two_runs_side_by_side_have_vms_of_the_same_name_and_leave_nothing(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    pytester.makepyfile(
        PREAMBLE
        + """
    def test_side_by_side(chvm_vm, tmp_path):
        (tmp_path / "file").write_text("of this run")
        vm = chvm_vm(name="same", shared_dirs={"code": tmp_path})
        os.mkfifo("go")
        tell(vm.ip)
        pathlib.Path("go").read_bytes()
        assert vm.check_output("cat /mnt/code/file") == "of this run"
"""
    )
    runs = [start_pytest(), start_pytest()]
    first, second = [run.news() for run in runs]
    assert first != second
    for index in range(2):
        pytester.path.joinpath(f"run{index}", "go").write_bytes(b"")
    assert [run.wait() for run in runs] == [0, 0], runs[0].output + runs[1].output
    assert not sandbox.left_behind()

"""Whatever ends a test, a run or a worker: nothing of its VMs is there afterwards."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

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
    [(signal.SIGINT, 2), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL), (signal.SIGHUP, None)],
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
    pytester.makepyfile(
        PREAMBLE
        + """
    @pytest.fixture
    def machine(chvm_vm, chvm_network, tmp_path):
        chvm_network()
        start(chvm_vm, tmp_path)
        tell("started")

    def test_waits(machine):
        threading.Event().wait()
"""
    )
    # Of the test alone: how long it takes to start a VM is the machine's affair.
    run = start_pytest("--timeout=2", f"--timeout-method={method}", "-o", "timeout_func_only=true")
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
def test_nothing_is_left_2_s_after_xdist_s_controller_alone_got_a_signal(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox, number: signal.Signals
) -> None:
    pytester.makepyfile(WAITING_TEST)
    run = start_pytest("-n", "1")
    worker_pid = int(run.news().split()[0])
    run.signal(number)
    status = run.wait(60)
    # The worker itself ends when it has noticed, and the locks are its own.
    left = sandbox.left_behind(but=[worker_pid])
    assert not {thing for thing in left.things if "/lock" not in thing}
    assert not sandbox.left_behind(timeout_s=60)
    assert number != signal.SIGTERM or status == 143


def _keepers(sandbox: Sandbox) -> list[str]:
    """Return the pids of a keeper's two processes, the parent first."""
    found = [line.split()[1] for line in sandbox.left_behind(timeout_s=0).things if "keeper.py" in line]

    def parent(pid: str) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]

    return sorted(found, key=lambda pid: parent(pid) in found)


GOES_ON = (
    PREAMBLE
    + """
    def test_goes_on(chvm_vm, chvm_network, tmp_path):
        chvm_network()
        vm = start(chvm_vm, tmp_path).wait_ready()
        os.mkfifo("go")
        tell(os.getpid())
        pathlib.Path("go").read_bytes()
        with pytest.raises(Exception) as caught:
            vm.run("true")
        tell(type(caught.value).__name__, caught.value)
        assert chvm_vm(name="next").check_output("echo works") == "works\\n"
"""
)


@pytest.mark.parametrize("victim", [0, 1], ids=["first process", "second process"])
def test_a_killed_keeper_takes_its_vms_along_is_named_and_has_a_successor(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox, victim: int
) -> None:
    pytester.makepyfile(GOES_ON)
    run = start_pytest()
    run.news()
    sandbox.run("kill", "-KILL", _keepers(sandbox)[victim])
    left = sandbox.left_behind(but=[run.pid])
    # The locks are the test's own, which lives.
    assert not {thing for thing in left.things if "/lock" not in thing}
    pytester.path.joinpath("run0", "go").write_bytes(b"")
    error = run.news()
    assert error.startswith("HypervisorError")
    assert "keeper" in error
    assert run.wait() == 0, run.output
    assert not sandbox.left_behind()


NEXT_TEST = (
    PREAMBLE
    + """
    def test_next(chvm_vm, tmp_path):
        start(chvm_vm, tmp_path)
"""
)


@pytest.mark.parametrize("by", ["next run", "reap"])
def test_what_a_killed_keeper_could_not_remove_the_next_run_or_reap_removes(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox, by: str
) -> None:
    pytester.makepyfile(WAITING_TEST)
    run = start_pytest()
    run.news()
    run.kill_with_keepers()
    left = sandbox.left_behind()
    assert not left.pids
    assert any(thing.startswith("link chvmbr") for thing in left.things)
    if by == "reap":
        sandbox.run(sys.executable, "-m", "pytest_chvm.cli", "reap")
    else:
        pytester.makepyfile(NEXT_TEST)
        assert start_pytest().wait() == 0
    assert not sandbox.left_behind()


def test_a_run_directory_that_somebody_removed_is_survived(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    pytester.makepyfile(
        PREAMBLE
        + """
    def test_goes_on(chvm_vm, chvm_network, tmp_path):
        chvm_network()
        start(chvm_vm, tmp_path)
        os.mkfifo("go")
        tell("started")
        pathlib.Path("go").read_bytes()
        chvm_vm(name="next", networks=[])
        tell("next")
        threading.Event().wait()
"""
    )
    run = start_pytest()
    run.news()
    sandbox.run("rm", "-r", "/run/pytest-chvm")
    pytester.path.joinpath("run0", "go").write_bytes(b"")
    assert run.news() == "next"
    run.signal(signal.SIGKILL)
    run.wait()
    assert not sandbox.left_behind()


def test_nothing_is_left_when_a_forked_process_outlives_the_run_with_all_its_descriptors(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    pytester.makepyfile(
        PREAMBLE
        + """
    def test_forks(chvm_vm, tmp_path):
        start(chvm_vm, tmp_path)
        pid = os.fork()
        if pid == 0:
            threading.Event().wait()
        tell(pid)
        if not (tmp_path.parent / "waits").exists():
            threading.Event().wait()
"""
    )
    run = start_pytest()
    forked = int(run.news())
    run.signal(signal.SIGKILL)
    run.wait()
    assert not sandbox.left_behind(but=[forked])


def test_a_forked_process_that_is_told_to_end_ends_and_the_run_goes_on(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    pytester.makepyfile(
        """
    import multiprocessing, signal, threading

    def test_forks(chvm_vm):
        process = multiprocessing.get_context("fork").Process(target=threading.Event().wait, daemon=True)
        process.start()
        # At once, when the child has hardly begun.
        process.terminate()
        process.join(10)
        exitcode = process.exitcode
        process.kill()
        assert exitcode == -signal.SIGTERM
"""
    )
    run = start_pytest()
    assert run.wait() == 0, run.output


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


def test_nothing_is_left_where_the_keeper_finds_no_room(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = "/run/small"
    sandbox.run("mkdir", small)
    # One page: for the record of the owner, but neither for that of the keeper nor for a lease's, whichever is written first.
    sandbox.run("mount", "-t", "tmpfs", "-o", "size=4k", "small", small)
    monkeypatch.setenv("XDG_RUNTIME_DIR", small)
    pytester.makepyfile("def test_vm(chvm_vm): chvm_vm()")
    run = start_pytest()
    assert run.wait() == 1
    assert re.search("the keeper process cannot start|the run directory .* cannot be written", run.output)
    assert "No space left on device" in run.output
    assert list(sandbox.path(small).iterdir()) == []
    sandbox.run("umount", small)


def test_nothing_is_left_of_a_keeper_that_was_killed_while_a_tap_was_in_use(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    pytester.makepyfile(
        """
    import os, signal
    from pytest_chvm.host.host import default_host
    from pytest_chvm.host.leases import Lease
    from pytest_chvm.host.networks.tap import make_tap, open_tap

    def test_taps():
        lease = Lease(default_host())
        tap = open_tap(make_tap(lease, None, None, None), None, ours=True)
        killed = default_host().keeper()
        os.kill(killed.pid, signal.SIGKILL)
        while killed.is_alive:
            pass
        assert default_host().keeper() is not killed
        os.close(tap)
        lease.release()
        assert default_host().close() == []
    """
    )
    run = start_pytest("--timeout=200")
    assert run.wait() == 0, run.output
    assert not sandbox.left_behind()

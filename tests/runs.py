"""Pytest runs as a user makes them, each in a process of its own: a pytest plugin of the project's tests.

What an inner run leaves behind is for `tests.leaks` to see.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from pytest_chvm.base.deadline import Deadline, wait_readable
from tests.leaks import Sandbox

# Arguments of inner runs: hypothesis has a plugin whose import takes three times as long as all the rest of a short run.
LIGHT = ("-p", "no:hypothesispytest")


# On a machine with many others an inner run may take as long.
INNER_RUN_TIMEOUT_S = 240.0

RunPytest = Callable[..., pytest.RunResult]


@pytest.fixture
def run_pytest(pytester: pytest.Pytester, user_environment: pytest.MonkeyPatch) -> RunPytest:
    """Run pytest as a user does, in a process of its own."""

    def run(*arguments: str | os.PathLike[str]) -> pytest.RunResult:
        return pytester.runpytest_subprocess(*LIGHT, *arguments, timeout=INNER_RUN_TIMEOUT_S)

    return run


@pytest.fixture(scope="session")
def guest_cache() -> Path:
    """The cache with the built-in guest in it, so that no inner run has to build one."""
    from pytest_chvm.machine.guest_choice import cache_dir, choose_guest
    from pytest_chvm.model import VmConfig
    from pytest_chvm.settings import Settings

    settings = Settings.resolve()
    choose_guest(VmConfig(), settings)
    return cache_dir(settings)


def users_environment(guest_cache: Path) -> dict[str, str]:
    """Return an environment as a user's shell has it: nothing of the outer run in it, but for the cache of guests."""
    from pytest_chvm.settings import OPTIONS

    # In a sandbox the run directory is below an empty /run, whatever the user's session says.
    ours = {*(option.variable for option in OPTIONS), "PYTEST_ADDOPTS", "PYTEST_TIMEOUT", "XDG_RUNTIME_DIR"}
    kept = {key: value for key, value in os.environ.items() if key not in ours and not key.startswith("PYTEST_XDIST")}
    return {**kept, "CHVM_CACHE_DIR": str(guest_cache)}


@pytest.fixture
def user_environment(monkeypatch: pytest.MonkeyPatch, guest_cache: Path) -> pytest.MonkeyPatch:
    """This process has the environment of a user's shell, for the time of the test."""
    environment = users_environment(guest_cache)
    for name in os.environ.keys() - environment.keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("CHVM_CACHE_DIR", environment["CHVM_CACHE_DIR"])
    return monkeypatch


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """Namespaces in which all that is new was left behind by the test."""
    with Sandbox() as namespaces:
        yield namespaces


class PytestProcess:
    """A pytest run in a sandbox that goes on while the test looks at it; the head of a process group, as in a shell."""

    def __init__(
        self,
        sandbox: Sandbox,
        directory: Path,
        *arguments: str | os.PathLike[str],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._sandbox = sandbox
        self._news = directory / "news"
        os.mkfifo(self._news)
        # Both ends, so that opening it does not block and it never ends.
        self._fd = os.open(self._news, os.O_RDWR | os.O_CLOEXEC)
        self.output_path = directory / "output.txt"
        command = [
            sys.executable,
            "-m",
            "pytest",
            *LIGHT,
            "-p",
            "no:cacheprovider",
            f"--basetemp={directory / 'basetemp'}",
            *arguments,
        ]
        with self.output_path.open("wb") as output:
            self._process = subprocess.Popen(
                sandbox.command(*command, cwd=directory),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**(os.environ if environment is None else environment), "NEWS": str(self._news), "TMPDIR": "/run/tmp"},
                process_group=0,
            )
        self.pid = self._process.pid

    def news(self, timeout_s: float = 60.0) -> str:
        """Return the next line that a test of the run writes to the file named by $NEWS."""
        line = b""
        while not line.endswith(b"\n"):
            ready = wait_readable([self._fd], Deadline.after(timeout_s))
            assert ready, f"no news within {timeout_s} s; the run said:\n{self.output}"
            line += os.read(self._fd, 1)
        return line.decode().strip()

    @property
    def output(self) -> str:
        """What the run has printed so far."""
        return self.output_path.read_text(errors="replace")

    def signal(self, number: int) -> None:
        """Send the run's first process a signal."""
        self._process.send_signal(number)

    def signal_all(self, number: int) -> None:
        """Send the run a signal as a terminal does: its workers get it too."""
        os.killpg(self.pid, number)

    def kill_with_keepers(self) -> None:
        """SIGKILL the run's first process and its keepers; stopped before, so that none of them sees another's end and cleans up."""
        keepers = [pid for pid, command in self._sandbox.processes().items() if "keeper.py" in command]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in (self.pid, *keepers):
                os.kill(pid, number)
        self.wait()

    def wait(self, timeout_s: float = 60.0) -> int:
        """Wait for the end of the run and return its exit status."""
        if self._process.poll() is None:
            with open(os.pidfd_open(self.pid), "rb", buffering=0) as ended:
                over = wait_readable([ended.fileno()], Deadline.after(timeout_s))
            assert over, f"it still runs after {timeout_s} s; it said:\n{self.output}"
        return self._process.wait()

    def close(self) -> None:
        """End the run, if it has not ended."""
        if self._process.poll() is None:
            self.signal_all(signal.SIGKILL)
        self._process.wait()
        os.close(self._fd)


StartPytest = Callable[..., PytestProcess]


@pytest.fixture
def start_pytest(pytester: pytest.Pytester, user_environment: pytest.MonkeyPatch, sandbox: Sandbox) -> Iterator[StartPytest]:
    """Start pytest in the sandbox, on the test files of this test, and go on."""
    started: list[PytestProcess] = []

    def start(*arguments: str | os.PathLike[str]) -> PytestProcess:
        directory = pytester.mkdir(f"run{len(started)}")
        started.append(PytestProcess(sandbox, directory, *arguments, pytester.path, f"--rootdir={pytester.path}"))
        return started[-1]

    yield start
    for run in started:
        run.close()

"""What the plugin's own tests share: pytest runs of a user's, and a sandbox for them."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_chvm.launcher import cache_dir, choose_guest
from pytest_chvm.model import VmConfig
from pytest_chvm.settings import OPTIONS, Settings

from .leaks import Sandbox

INNER_RUN_TIMEOUT_S = 120.0

RunPytest = Callable[..., pytest.RunResult]


@pytest.fixture(scope="session")
def guest_cache() -> Path:
    """The cache with the built-in guest in it, so that no inner run has to build one."""
    settings = Settings.resolve()
    choose_guest(VmConfig(), settings)
    return cache_dir(settings)


@pytest.fixture(scope="session")
def guest_kernel(guest_cache: Path) -> Path:
    """The built-in guest's kernel."""
    kernel = choose_guest(VmConfig(), Settings.resolve()).config.kernel
    assert kernel is not None
    return kernel


@pytest.fixture
def user_environment(monkeypatch: pytest.MonkeyPatch, guest_cache: Path) -> pytest.MonkeyPatch:
    """An environment as a user's shell has it: nothing of the outer run in it, but for the cache of guests."""
    for option in OPTIONS:
        monkeypatch.delenv(option.variable, raising=False)
    for name in [*filter(lambda name: name.startswith("PYTEST_XDIST"), os.environ), "PYTEST_ADDOPTS", "PYTEST_TIMEOUT"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CHVM_CACHE_DIR", str(guest_cache))
    return monkeypatch


@pytest.fixture
def run_pytest(pytester: pytest.Pytester, user_environment: pytest.MonkeyPatch) -> RunPytest:
    """Run pytest as a user does, in a process of its own."""

    def run(*arguments: str | os.PathLike[str]) -> pytest.RunResult:
        return pytester.runpytest_subprocess(*arguments, timeout=INNER_RUN_TIMEOUT_S)

    return run


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """Namespaces in which all that is new was left behind by the test."""
    with Sandbox() as namespaces:
        yield namespaces


class PytestProcess:
    """A pytest run in a sandbox that goes on while the test looks at it."""

    def __init__(self, sandbox: Sandbox, directory: Path, *arguments: str | os.PathLike[str]) -> None:
        self._news = directory / "news"
        os.mkfifo(self._news)
        # Both ends, so that opening it does not block and it never ends.
        self._fd = os.open(self._news, os.O_RDWR | os.O_CLOEXEC)
        self.output_path = directory / "output.txt"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={directory / 'basetemp'}", *arguments]
        with self.output_path.open("wb") as output:
            self._process = subprocess.Popen(
                sandbox.command(*command, cwd=directory),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "NEWS": str(self._news)},
            )
        self.pid = self._process.pid

    def news(self, timeout_s: float = 60.0) -> str:
        """Return the next line that a test of the run writes to the file named by $NEWS."""
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._fd], [], [], timeout_s)
            assert ready, f"no news within {timeout_s} s; the run said:\n{self.output}"
            line += os.read(self._fd, 1)
        return line.decode().strip()

    @property
    def output(self) -> str:
        """What the run has printed so far."""
        return self.output_path.read_text(errors="replace")

    def signal(self, number: int) -> None:
        """Send the run a signal."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float = 30.0) -> int:
        """Wait for the end of the run and return its exit status."""
        return self._process.wait(timeout_s)

    def close(self) -> None:
        """End the run, if it has not ended."""
        self._process.kill()
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

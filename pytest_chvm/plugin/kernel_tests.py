"""The kernel's own tests as tests of a run: programs of kselftest (--chvm-kselftest) and KUnit (--chvm-kunit), each in a VM."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from pytest_chvm.plugin.keys import KSELFTEST, KUNIT

if TYPE_CHECKING:
    from pytest_chvm.plugin.factory import VmFactory
    from pytest_chvm.plugin.ktap import Ktap

# KUnit's suites that are built into the kernel run when it boots.
BOOT = "boot"
# As of tools/testing/selftests/kselftest/runner.sh, in seconds; a target's file `settings` may have another one, 0 for none.
DEFAULT_TIMEOUT_S = 45
# Of an installed tree (`make kselftest-install`), lines TARGET:PROGRAM.
LIST_FILE = "kselftest-list.txt"
MAKE_TIMEOUT_S = 120.0

Test = Callable[["VmFactory", "Ktap"], None]


def collect(session: pytest.Session) -> Iterator[pytest.Item]:
    """Yield the kernel's tests that the options ask for."""
    config = session.config
    for name in config.getoption(KSELFTEST):
        directory = Path(config.invocation_params.dir, name).resolve()
        yield from session.genitems(
            KernelTests.make(session, directory, f"kselftest/{directory.name}", partial(kselftests, directory))
        )
    if modules := config.getoption(KUNIT):
        place = config.invocation_params.dir
        yield from session.genitems(KernelTests.make(session, place, "kunit", partial(kunit_tests, modules, place)))


class KernelTests(pytest.Module):
    """A collector of functions that are made here, by names that need not be a function's."""

    make_tests: Callable[[], dict[str, Test]]

    @classmethod
    def make(cls, session: pytest.Session, path: Path, name: str, make_tests: Callable[[], dict[str, Test]]) -> KernelTests:
        """Return one; `make_tests` is called when it is collected."""
        made: KernelTests = cls.from_parent(session, path=path, nodeid=name)
        made.name = name
        made.make_tests = make_tests
        return made

    def _getobj(self) -> ModuleType:
        module = ModuleType(re.sub(r"\W", "_", self.name))
        try:
            module.__dict__.update(self.make_tests())
        except ValueError as error:
            raise self.CollectError(str(error)) from error
        return module

    def collect(self) -> Iterator[pytest.Item | pytest.Collector]:
        """Yield its tests, which are shown by their names: pytest takes a dot in one of them for a class."""
        for item in super().collect():
            if isinstance(item, pytest.Function):
                where = self.path, None, f"{self.name}: {item.name}"
                item.reportinfo = lambda where=where: where  # type: ignore[method-assign, misc]
            yield item

    def funcnamefilter(self, name: str) -> bool:
        """Tell whether a name of the module is a test's: all but its own are."""
        return not name.startswith("__")


def kselftests(directory: Path) -> dict[str, Test]:
    """Return the tests of a target of kselftest; raises ValueError, in words, where it has none."""
    if not directory.is_dir():
        raise ValueError(f"--chvm-kselftest={directory}: there is no such directory")
    programs = _installed(directory) or _emitted(directory)
    if not programs:
        raise ValueError(f"--chvm-kselftest={directory}: it has no tests")
    timeout_s = kselftest_timeout_s(directory)
    return {program: _kselftest(directory / program, timeout_s) for program in programs}


def _installed(directory: Path) -> list[str]:
    """Return what the list of an installed tree says of a target; nothing where there is no list."""
    for above in directory.parents[:3]:
        if (above / LIST_FILE).is_file():
            target = f"{directory.relative_to(above)}:"
            lines = (above / LIST_FILE).read_text(errors="replace").splitlines()
            return [line.removeprefix(target).strip() for line in lines if line.startswith(target)]
    return []


def _emitted(directory: Path) -> list[str]:
    """Return what a target's Makefile says, as the kernel's own installation asks it."""
    if not (directory / "Makefile").is_file():
        raise ValueError(f"--chvm-kselftest={directory}: expected a target of kselftest, with a Makefile, or of an installed tree")
    command = ["make", "-s", "--no-print-directory", "-C", os.fspath(directory), "COLLECTION=chvm", "emit_tests"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=MAKE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"--chvm-kselftest={directory}: make cannot be asked for its tests: {error}") from error
    if done.returncode != 0:
        raise ValueError(f"--chvm-kselftest={directory}: make cannot be asked for its tests: {done.stderr.strip()[-1000:]}")
    return [line.removeprefix("chvm:") for line in done.stdout.splitlines() if re.fullmatch(r"chvm:[^/\s]+", line)]


def kselftest_timeout_s(directory: Path) -> int | None:
    """Return how long a program of a target may take; None: as long as it likes."""
    settings = directory / "settings"
    text = settings.read_text(errors="replace") if settings.is_file() else ""
    found = re.search(r"^timeout=(\d{1,6})\s*$", text, re.M)
    timeout_s = int(found[1]) if found else DEFAULT_TIMEOUT_S
    return timeout_s or None


def _kselftest(program: Path, timeout_s: int | None) -> Test:
    def run(chvm_vm: VmFactory, chvm_ktap: Ktap) -> None:
        if not program.is_file():
            pytest.fail(f"{program} is not there: build it (make -C {program.parent})", pytrace=False)
        chvm_ktap(chvm_vm(root="host"), _command(program), timeout=timeout_s, cwd=program.parent, by_status=True)

    return run


def _command(program: Path) -> list[str]:
    """Return what runs a program in its directory: by its interpreter, where it is a script that may not be run."""
    if not os.access(program, os.X_OK):
        with program.open("rb") as file:
            first = file.readline(200)
        if first.startswith(b"#!"):
            return [*os.fsdecode(first[2:]).split(), f"./{program.name}"]
    return [f"./{program.name}"]


def kunit_tests(modules: list[str], place: Path) -> dict[str, Test]:
    """Return a test for each module, and one for the boot; paths are from `place`. Raises ValueError for what is no module."""
    tests: dict[str, Test] = {}
    for module in modules:
        path = Path(place, module)
        if module != BOOT and not path.is_file():
            raise ValueError(f"--chvm-kunit={module}: expected a kernel module's file, or 'boot'")
        tests[module if module == BOOT else path.name] = _kunit(None if module == BOOT else path)
    return tests


def _kunit(module: Path | None) -> Test:
    def run(chvm_vm: VmFactory, chvm_ktap: Ktap) -> None:
        chvm_ktap.kunit(chvm_vm(), module)

    return run

"""Where a test runs: a guest, and the pytest in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_chvm.machine.events import COMMAND
from pytest_chvm.machine.guest_choice import cache_dir
from pytest_chvm.machine.machine import RUN_TIMEOUT_S
from pytest_chvm.machine.vm import Vm
from pytest_chvm.model import CommandResult, HostRoot
from pytest_chvm.plugin.fixtures import new_factory
from pytest_chvm.plugin.inside import coverage_home
from pytest_chvm.plugin.inside.resident import resident_pytest
from pytest_chvm.plugin.inside.session import GuestPytest, Runs
from pytest_chvm.plugin.keys import settings_key
from pytest_chvm.plugin.marker import inside_of, marker_arguments, vm_arguments
from pytest_chvm.plugin.run import begin_host

if TYPE_CHECKING:
    from pytest_chvm.plugin.factory import VmFactory

# What a guest has at least that is to run a pytest, unless its test says otherwise.
MEMORY_MB = 512
# To import pytest and to collect a file's tests; in software, on a busy machine.
START_S = 300.0
FINISH_S = 30.0


@dataclass(eq=False)
class Place:
    """A guest, and the pytest in it. `what`: which tests can run there, by their module, kernel and marker's arguments.

    `inner` is None before the first test, and once it is of no use any more; `busy`: it is in the middle of a test.
    """

    what: tuple[object, ...]
    config: pytest.Config
    factory: VmFactory
    inner: GuestPytest | None = None
    busy: bool = False

    def start(self, item: pytest.Item) -> GuestPytest:
        """Return the pytest in the guest, both started where they are not there yet."""
        if self.inner is None:
            guest, waits = boot(self.config, self.factory)
            self.inner = GuestPytest(guest, waits=waits)
            self.inner.start(item, coverage_home.options(self.config), START_S)
        return self.inner

    def leave(self) -> None:
        """End the guest, and bring home what was measured in it."""
        try:
            if self.inner is not None and not self.busy and coverage_home.options(self.config) is not None:
                coverage_home.bring(self.config, self.inner.coverage(FINISH_S))
        finally:
            self.inner = None
            self.factory.close()


def boot(config: pytest.Config, factory: VmFactory) -> tuple[Runs, bool]:
    """Return a guest with the host's file system, and whether a pytest waits in it."""
    root = factory.defaults.get("root", "host")
    root = HostRoot() if root == "host" else root
    if not isinstance(root, HostRoot):
        # To be refused like any other.
        return factory(), False
    # The first one imports all that a pytest needs.
    timeout = factory.defaults.get("boot_timeout", START_S)
    progress = begin_host(config).show_progress
    resident = resident_pytest(config, cache_dir(config.stash[settings_key]), progress)
    return _Beside(factory(root=replace(root, resident=resident), boot_timeout=timeout)), True


@dataclass(frozen=True, slots=True)
class _Beside:
    """Runs commands in a guest outside of the file system that a test's have: its own programs are there at once."""

    vm: Vm

    def run(self, command: str, *, timeout: float | None = RUN_TIMEOUT_S, input: str | None = None) -> CommandResult:
        """Run one and return what it did."""
        machine = self.vm.machine
        with machine.log.timed(COMMAND, command=command, returncode=None) as outcome:
            data = None if input is None else input.encode(errors="surrogateescape")
            done = machine.run(command, timeout=timeout, input=data, is_tests=False)
            outcome["returncode"] = done.returncode
        return done


def kind_of_place(item: pytest.Item) -> tuple[object, ...]:
    """Return what two tests have to have in common to run in one guest."""
    of = item.getparent(pytest.Module) if inside_of(item) == "module" else item
    return of, _kernel(item), marker_arguments(item)


def place_for(item: pytest.Item) -> Place:
    """Return a new place for a test; nothing is started."""
    config = item.config
    settings = config.stash[settings_key]
    kernel = _kernel(item)
    defaults: dict[str, Any] = {"memory_mb": max(settings.memory_mb, MEMORY_MB), **({"kernel": kernel} if kernel else {})}
    defaults |= vm_arguments(item)
    temporary = config._tmp_path_factory  # type: ignore[attr-defined]
    factory = new_factory(item.session, settings, temporary, item.name, item.nodeid, defaults, None)
    return Place(kind_of_place(item), config, factory)


def _kernel(item: pytest.Item) -> Any:
    """Return the kernel of --chvm-kernel that this run of a test is for, where there are several."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("chvm_kernel")


def follower(item: pytest.Item, nextitem: pytest.Item | None) -> pytest.Item | None:
    """Return the test that comes next in the same guest, as far as is known: fixtures that it has too live on."""
    items = item.session.items
    if nextitem is None or inside_of(item) != "module" or nextitem not in items:
        return None
    kind = kind_of_place(item)
    return next((each for each in items[items.index(nextitem) :] if inside_of(each) and kind_of_place(each) == kind), None)

"""The fixtures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_chvm.plugin.expect import expect_vms
from pytest_chvm.plugin.keys import factories_key, in_guest_key, item_key, settings_key
from pytest_chvm.plugin.marker import OF_KERNEL, marker_arguments, vm_arguments
from pytest_chvm.plugin.protocol import at_end_of_caller
from pytest_chvm.plugin.run import begin_host, worker_of
from pytest_chvm.settings import Settings

if TYPE_CHECKING:
    from pytest_chvm.drivers.base import VmDriver
    from pytest_chvm.machine.vm import Vm
    from pytest_chvm.plugin.factory import VmFactory
    from pytest_chvm.plugin.ktap import Ktap

ONE_KERNEL_ONLY = (
    "gets its VM by getfixturevalue, which pytest does not see when it collects: mark it with @pytest.mark.chvm to have it run "
    "once per kernel. This time it is run with one only"
)


@pytest.fixture(scope="session")
def chvm_settings(pytestconfig: pytest.Config) -> Settings:
    """What the options resolved to."""
    return pytestconfig.stash[settings_key]


@pytest.fixture(scope="session")
def chvm_driver(pytestconfig: pytest.Config, chvm_settings: Settings) -> VmDriver:
    """The driver in use."""
    from pytest_chvm.machine.plan import driver_for

    return driver_for(chvm_settings, begin_host(pytestconfig))


@pytest.fixture(scope="session")
def chvm_kernel(request: pytest.FixtureRequest, chvm_settings: Settings) -> Path | None:
    """The kernel of --chvm-kernel that this run of the test is for; None for the built-in guest's."""
    if hasattr(request, "param"):
        kernel: Path = request.param
        return kernel
    return chvm_settings.kernel[0] if chvm_settings.kernel else None


@pytest.fixture
def chvm_vm(
    request: pytest.FixtureRequest,
    chvm_settings: Settings,
    chvm_kernel: Path | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[VmFactory]:
    """Factory of VMs that end with the test: `vm = chvm_vm(kernel=..., shared_dirs=...)` boots one and blocks until it is ready."""
    defaults = vm_arguments(request.node)
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if len(chvm_settings.kernel) > 1 and "kernel" not in defaults and "chvm_kernel" not in parameters:
        request.node.warn(pytest.PytestWarning(f"{request.node.nodeid} {ONE_KERNEL_ONLY}: {chvm_kernel}"))
    longest_boot_s = _longest_boot_s(request.config, request.node)
    check = _kernel_check(request.node)
    yield from _factory(request, chvm_settings, chvm_kernel, tmp_path_factory, request.node.name, defaults, longest_boot_s, check)


def _kernel_check(item: pytest.Item) -> Callable[[Vm], None] | None:
    """Return what looks at the kernel of a test's VM, where its marker says that it has to be of some kind."""
    if not OF_KERNEL & marker_arguments(item).keys():
        return None
    from functools import partial

    from pytest_chvm.plugin.kernel_needs import check_kernel_of

    return partial(check_kernel_of, item)


@pytest.fixture(scope="session")
def chvm_vm_factory(
    request: pytest.FixtureRequest,
    chvm_settings: Settings,
    chvm_kernel: Path | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[VmFactory]:
    """`chvm_vm` for fixtures of any other scope; its VMs end with the session."""
    longest_boot_s = _longest_boot_s(request.config)
    yield from _factory(request, chvm_settings, chvm_kernel, tmp_path_factory, "session", {}, longest_boot_s)


@pytest.fixture
def chvm_network(chvm_vm: VmFactory) -> Any:
    """Factory of isolated networks for several VMs of the test: `chvm_vm(networks=[net])`."""
    return chvm_vm.network


@pytest.fixture
def chvm_ktap(request: pytest.FixtureRequest) -> Ktap:
    """Runs a test program in a VM that prints KTAP or TAP, and reports each of its results: `chvm_ktap(vm, "/mnt/tests/run")`."""
    from pytest_chvm.plugin.ktap import Ktap

    return Ktap(request)


def _factory(
    request: pytest.FixtureRequest,
    settings: Settings,
    kernel: Path | None,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    defaults: dict[str, Any],
    longest_boot_s: float | None,
    check: Callable[[Vm], None] | None = None,
) -> Iterator[VmFactory]:
    if in_guest_key in request.config.stash:
        from pytest_chvm.errors import UnsupportedError

        raise UnsupportedError("this test runs in a guest (`inside`), where no VM can be started: those are started out there")
    item = request.config.stash[item_key]
    if item.get_closest_marker("chvm") is None:
        # It was not seen to use a VM when it was collected (`getfixturevalue`).
        item.add_marker("chvm")
    if kernel is not None:
        defaults = {"kernel": kernel, **defaults}
    test = getattr(request.node, "nodeid", None) or "(session)"
    factory = new_factory(request.session, settings, tmp_path_factory, name, test, defaults, longest_boot_s, check)
    try:
        yield factory
    finally:
        factory.close()


def new_factory(
    session: pytest.Session,
    settings: Settings,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    test: str,
    defaults: dict[str, Any],
    longest_boot_s: float | None,
    check: Callable[[Vm], None] | None = None,
) -> VmFactory:
    """Return a factory of VMs for a test, which its reports know of; whoever asks for it closes it."""
    from functools import cache

    from pytest_chvm.plugin.factory import VmFactory

    config = session.config
    expect_vms(config, session)
    factory = VmFactory(
        settings,
        begin_host(config),
        name=name,
        namespace=worker_of(config),
        log_dir=cache(lambda: tmp_path_factory.mktemp("chvm")),
        defaults=defaults,
        longest_boot_s=longest_boot_s,
        at_end_of_caller=lambda end: at_end_of_caller(config, end),
        test=test,
        check=check,
    )
    config.stash[factories_key].append(factory)
    return factory


def _longest_boot_s(config: pytest.Config, item: pytest.Item | None = None) -> float | None:
    """Return how long a boot may take to fail before pytest-timeout does: it ends in its own report; None: as long as it likes."""
    limit = time_limit_s(config, item)
    return None if limit is None else limit * 0.8


def time_limit_s(config: pytest.Config, item: pytest.Item | None = None) -> float | None:
    """Return the seconds after which pytest-timeout ends a test; None: never."""
    mark = item.get_closest_marker("timeout") if item is not None else None
    limit = (mark.args[0] if mark.args else mark.kwargs.get("timeout")) if mark else None
    if limit is None and config.pluginmanager.hasplugin("timeout"):
        # As pytest-timeout itself looks for it.
        limit = config.getoption("timeout")
        if limit is None:
            limit = os.environ.get("PYTEST_TIMEOUT") or config.getini("timeout")
    return float(limit) if limit and float(limit) > 0 else None

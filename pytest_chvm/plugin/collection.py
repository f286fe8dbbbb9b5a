"""Which tests use VMs, how often each runs, and what is prepared where there are some."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_chvm.plugin.expect import expect_vms
from pytest_chvm.plugin.keys import (
    DEFAULT_ARTIFACTS,
    KSELFTEST,
    KUNIT,
    VM_FIXTURES,
    controller_key,
    in_guest_key,
    kernel_ids_key,
    settings_key,
)
from pytest_chvm.plugin.marker import OF_KERNEL, inside_of, marker_arguments
from pytest_chvm.plugin.run import progress_of, run_id
from pytest_chvm.settings import Settings


def _has_kernel_tests(config: pytest.Config) -> bool:
    return in_guest_key not in config.stash and bool(config.getoption(KSELFTEST) or config.getoption(KUNIT))


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave out the tests that a run without arguments would have, where it is one of the kernel's tests."""
    return True if _has_kernel_tests(config) and config.args_source is not pytest.Config.ArgsSource.ARGS else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Add the kernel's own tests, and mark each test that uses a VM, before -m selects."""
    if _has_kernel_tests(session.config):
        from pytest_chvm.plugin.kernel_tests import collect

        items.extend(collect(session))
    for item in items:
        if VM_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("chvm")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a VM test once per kernel, unless its marker names one."""
    kernels = metafunc.config.stash[settings_key].kernel
    marks = [*metafunc.definition.iter_markers("chvm")]
    if len(kernels) > 1 and marks and "chvm_kernel" not in metafunc.fixturenames:
        # A test that gets its VM by `getfixturevalue` shows that only by its marker.
        metafunc.fixturenames.append("chvm_kernel")
    if len(kernels) > 1 and "chvm_kernel" in metafunc.fixturenames and not any("kernel" in mark.kwargs for mark in marks):
        metafunc.parametrize("chvm_kernel", kernels, ids=_kernel_ids(metafunc.config), indirect=True, scope="session")


def _kernel_ids(config: pytest.Config) -> list[str]:
    """Return what the kernels are called in the ids of tests, the same in each process of a run."""
    if kernel_ids_key not in config.stash:
        from pytest_chvm.base.cache import default_cache_dir
        from pytest_chvm.guest.kernels.find import kernel_ids

        settings = config.stash[settings_key]
        cache = settings.cache_dir or default_cache_dir()
        config.stash[kernel_ids_key] = kernel_ids(settings.kernel, cache, progress_of(config))
    return config.stash[kernel_ids_key]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Prepare for VMs where there are tests that use them."""
    if in_guest_key in session.config.stash:
        return
    if any(item.get_closest_marker("chvm") for item in session.items):
        # Under xdist the controller checks.
        if not hasattr(session.config, "workerinput") and not session.config.option.collectonly:
            _check_options(session.config)
        expect_vms(session.config, session)
        if any(OF_KERNEL & marker_arguments(item).keys() for item in session.items):
            from pytest_chvm.plugin import kernel_needs

            session.config.pluginmanager.register(kernel_needs, "chvm-kernel-needs")
        if any(inside_of(item) for item in session.items):
            from pytest_chvm.plugin.inside.runs import InsideRuns

            session.config.pluginmanager.register(InsideRuns(session.config), "chvm-inside")


def _check_options(config: pytest.Config) -> None:
    """Refuse options that each VM test would fail with."""
    from pytest_chvm.plugin.option_checks import check_options

    try:
        check_options(config.stash[settings_key], config.rootpath / DEFAULT_ARTIFACTS, progress_of(config))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def expect_vms_of_workers(config: pytest.Config) -> None:
    """Prepare for VMs of workers, of which the controller checks the options."""
    _check_options(config)
    expect_vms(config)


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str | None:
    """Say which VMM and network the VM tests get, and why; nothing in a run without them."""
    if in_guest_key in config.stash or not any(item.get_closest_marker("chvm") for item in items):
        return None
    return choices(config.stash[settings_key])


def choices(settings: Settings) -> str:
    """Return which VMM and network VMs get, and why, in two lines; what is missing where there can be none."""
    from pytest_chvm.drivers import choose_vmm
    from pytest_chvm.errors import VmError
    from pytest_chvm.machine.nics import network_mode
    from pytest_chvm.machine.plan import driver_for

    try:
        why_vmm = "asked for" if settings.vmm != "auto" else choose_vmm(accel=settings.accel, binary=settings.binary)[1]
        driver = driver_for(settings)
        mode, why_mode = network_mode(settings, driver)
    except VmError as error:
        return f"chvm: {error}"
    return f"chvm: VMM {driver.vmm}: {why_vmm}\nchvm: network {mode}: {why_mode}"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Look after the VMs of an xdist worker, from its controller."""
    from pytest_chvm.plugin.xdist import Controller

    controller = node.config.stash.get(controller_key, None)
    if controller is None:
        controller = node.config.stash[controller_key] = Controller(run_id(node.config), lambda: expect_vms_of_workers(node.config))
        node.config.pluginmanager.register(controller, "chvm-controller")
    controller.configure_node(node)

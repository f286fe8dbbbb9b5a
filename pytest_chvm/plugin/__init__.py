"""Options, marker, hooks and fixtures: wiring only.

Loaded by every pytest run of everyone who has this package, so anything heavy is imported inside functions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_chvm.settings import OPTIONS, Settings

if TYPE_CHECKING:
    from pytest_chvm.drivers.base import VmDriver
    from pytest_chvm.host.runs import Level
    from pytest_chvm.plugin.factory import VmFactory
    from pytest_chvm.plugin.sigterm import OrderlyEnd
    from pytest_chvm.plugin.xdist import Controller

VM_FIXTURES = {"chvm_vm", "chvm_vm_factory", "chvm_network"}
DEFAULT_ARTIFACTS = "chvm-artifacts"
ONE_KERNEL_ONLY = (
    "gets its VM by getfixturevalue, which pytest does not see when it collects: mark it with @pytest.mark.chvm to have it run "
    "once per kernel. This time it is run with one only"
)

_settings_key = pytest.StashKey[Settings]()
_factories_key = pytest.StashKey[list[Any]]()
_failed_key = pytest.StashKey[bool]()
_item_key = pytest.StashKey[pytest.Item]()
_summed_up_key = pytest.StashKey[bool]()
_failures_key = pytest.StashKey[list[str]]()
_attempt_key = pytest.StashKey[int]()
_making_key = pytest.StashKey[list[pytest.FixtureRequest]]()
_teardown_key = pytest.StashKey[ExitStack]()
_pid_key = pytest.StashKey[int]()
_depth_key = pytest.StashKey[int]()
_level_key: pytest.StashKey[Level] = pytest.StashKey()
_undo_key = pytest.StashKey[ExitStack]()
_controller_key: pytest.StashKey[Controller] = pytest.StashKey()
_sigterm_key: pytest.StashKey[OrderlyEnd] = pytest.StashKey()

# Of this process, those that are configured: a test can have a whole run within it (pytester's `runpytest_inprocess`).
_configs: list[pytest.Config] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add every option, on the command line and as ini key."""
    group = parser.getgroup("chvm", "virtual machines (pytest-chvm)")
    for option in OPTIONS:
        group.addoption(
            option.flag,
            dest=option.ini_key,
            action="append" if option.many else "store",
            default=None,
            metavar=option.metavar,
            choices=option.choices or None,
            help=f"{option.help} [{option.variable}]".replace("%", "%%"),
        )
        kind: Any = "linelist" if option.many else "string"
        if option.metavar in ("N", "SECONDS"):
            kind = _number_kind(option.metavar)
        parser.addini(option.ini_key, option.help, type=kind, default=None)


def _number_kind(metavar: str) -> Any:
    """Return the type of a number in a configuration file: from 9 on pytest takes a TOML file's own, and insists on the type."""
    if pytest.version_tuple >= (9, 2):
        # What an INI file has is a str, and ours to convert.
        return str | int | float if metavar == "SECONDS" else str | int
    if pytest.version_tuple >= (9,):
        return "float" if metavar == "SECONDS" else "int"
    return "string"


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker and resolve the options."""
    config.addinivalue_line(
        "markers", "chvm(**config): arguments of chvm_vm for this test; every test that uses a VM has this marker"
    )
    config.stash[_factories_key] = []
    config.stash[_failures_key] = []
    config.stash[_making_key] = []
    config.stash[_pid_key] = os.getpid()
    config.stash[_depth_key] = len(_configs)
    _configs.append(config)
    command_line = {option.name: config.getoption(option.ini_key) for option in OPTIONS}
    try:
        config.stash[_settings_key] = Settings.resolve(command_line, ini=_ini_values(config))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def _ini_values(config: pytest.Config) -> dict[str, Any]:
    """Return the ini keys that are set; relative paths are relative to the configuration file."""
    base = config.inipath.parent if config.inipath else config.rootpath
    values: dict[str, Any] = {}
    for option in OPTIONS:
        try:
            value = config.getini(option.ini_key)
        except (ValueError, TypeError) as error:
            # Before 9.2 pytest does not say of which key a number is none.
            raise ValueError(f"{option.ini_key}: {error}") from error
        if value and option.metavar in ("PATH", "DIR"):
            texts = [text if text.startswith("~") else str(base / text) for text in (value if option.many else [value])]
            value = texts if option.many else texts[0]
        values[option.ini_key] = value
    return values


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test that uses a VM, before -m selects."""
    for item in items:
        if VM_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("chvm")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a VM test once per kernel, unless its marker names one."""
    kernels = metafunc.config.stash[_settings_key].kernel
    marks = [*metafunc.definition.iter_markers("chvm")]
    if len(kernels) > 1 and marks and "chvm_kernel" not in metafunc.fixturenames:
        # It gets its VM while it runs (`getfixturevalue`), which its marker alone says.
        metafunc.fixturenames.append("chvm_kernel")
    if len(kernels) > 1 and "chvm_kernel" in metafunc.fixturenames and not any("kernel" in mark.kwargs for mark in marks):
        ids = [kernel.name for kernel in kernels]
        if len(set(ids)) < len(ids):
            ids = [str(kernel).strip("/").replace("/", "-") for kernel in kernels]
        metafunc.parametrize("chvm_kernel", kernels, ids=ids, indirect=True, scope="session")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Prepare for VMs where there are tests that use them."""
    if any(item.get_closest_marker("chvm") for item in session.items):
        # Under xdist the controller checks.
        if not hasattr(session.config, "workerinput") and not session.config.option.collectonly:
            _check_options(session.config)
        _expect_vms(session.config, session)


def _check_options(config: pytest.Config) -> None:
    """Refuse options that each VM test would fail with."""
    from pytest_chvm.plugin.option_checks import check_options

    try:
        check_options(config.stash[_settings_key], config.rootpath / DEFAULT_ARTIFACTS)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def _expect_vms_of_workers(config: pytest.Config) -> None:
    _check_options(config)
    _expect_vms(config)


def _expect_vms(config: pytest.Config, session: pytest.Session | None = None) -> None:
    if _sigterm_key not in config.stash:
        from pytest_chvm.plugin import sigterm

        controller = config.stash.get(_controller_key, None)
        is_worker = hasattr(config, "workerinput")
        workers = controller.workers if controller else {}
        config.stash[_sigterm_key] = sigterm.OrderlyEnd(session if is_worker else None, workers)
        if journal := _worker_input(config).get("journal"):
            # An xdist controller hears of nothing that a worker has collected but the names; this it sees.
            Path(journal).write_text(f"{os.getpid()}\n")


def _worker_input(config: pytest.Config) -> dict[str, Any]:
    given: dict[str, Any] = getattr(config, "workerinput", {}).get("chvm", {})
    return given


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str | None:
    """Say which VMM and network the VM tests get, and why; nothing in a run without them."""
    if not any(item.get_closest_marker("chvm") for item in items):
        return None
    return _choices(config.stash[_settings_key])


def _choices(settings: Settings) -> str:
    from pytest_chvm.drivers import choose_vmm
    from pytest_chvm.errors import VmError
    from pytest_chvm.machine.launcher import driver_for
    from pytest_chvm.machine.nics import network_mode

    try:
        why_vmm = "asked for" if settings.vmm != "auto" else choose_vmm(accel=settings.accel, binary=settings.binary)[1]
        driver = driver_for(settings)
        mode, why_mode = network_mode(settings, driver)
    except VmError as error:
        return f"chvm: {error}"
    return f"chvm: VMM {driver.vmm}: {why_vmm}\nchvm: network {mode}: {why_mode}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what was started and that it is gone; under xdist, where the controller collects nothing, also what the VM tests got."""
    used = any(getattr(report, "chvm_used", False) for reports in terminalreporter.stats.values() for report in reports)
    if used and config.pluginmanager.hasplugin("dsession"):
        for line in _choices(config.stash[_settings_key]).splitlines():
            terminalreporter.write_line(line)
    _say_what_is_left(config)


def _say_what_is_left(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    controller = config.stash.get(_controller_key, None)
    # A child that was forked in a test, and goes on as pytest, has nothing to say of its parent's.
    if reporter is None or _summed_up_key in config.stash or config.stash.get(_pid_key, None) != os.getpid():
        return
    # VMs of `launch` alone belong to the outermost run.
    launched = config.stash[_depth_key] == 0 and "pytest_chvm.host.runs" in sys.modules
    if launched or _level_key in config.stash or (controller and controller.journals):
        config.stash[_summed_up_key] = True
        lines = _summary(config, controller)
        if lines and (reporter.stats.get("failed") or reporter.stats.get("error")):
            # What is above may be a guest's.
            reporter.write_sep("-", "virtual machines")
        for line in lines:
            reporter.write_line(line)


def _summary(config: pytest.Config, controller: Controller | None) -> list[str]:
    from pytest_chvm.host import registry, runs
    from pytest_chvm.report.listing import run_summary

    started = runs.started(controller.journals if controller else ())
    failures = config.stash[_failures_key] + (controller.failures if controller else [])
    left = list(dict.fromkeys([*failures, *registry.left_by(_run_id(config))]))
    return run_summary({kind: started[kind] for kind in runs.KINDS}, left) if started or left else []


def _run_id(config: pytest.Config) -> str:
    """Return what the processes of this run have in common, and no other run has."""
    given: str | None = _worker_input(config).get("run")
    if given:
        return given
    from pytest_chvm.host.keeper.remains import start_time_ticks

    pid, depth = config.stash[_pid_key], config.stash[_depth_key]
    return f"{pid}-{start_time_ticks(pid)}{f'-{depth}' if depth else ''}"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Look after the VMs of an xdist worker, from its controller."""
    from pytest_chvm.plugin.xdist import Controller

    controller = node.config.stash.get(_controller_key, None)
    if controller is None:
        controller = node.config.stash[_controller_key] = Controller(
            _run_id(node.config), lambda: _expect_vms_of_workers(node.config)
        )
        node.config.pluginmanager.register(controller, "chvm-controller")
    controller.configure_node(node)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Have a test fail for what has befallen its VMs after its last call."""
    __tracebackhide__ = True
    factories: list[VmFactory] = item.config.stash[_factories_key]
    try:
        result = yield
    except Exception as error:
        if factories:
            from pytest_chvm.plugin.checkup import check_up

            if (trouble := check_up(factories)) is not None:
                error.add_note(f"{type(trouble).__name__}: {trouble}")
        raise
    if factories:
        from pytest_chvm.plugin.checkup import check_up

        if (trouble := check_up(factories)) is not None:
            raise trouble
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """End whatever a test's VMs have left, and have the test fail for it."""
    factories: list[VmFactory] = item.config.stash[_factories_key]
    try:
        with ExitStack() as ends:
            item.config.stash[_teardown_key] = ends
            result = yield
    except BaseException as error:
        if left := _end_what_is_left(factories):
            error.add_note(_left_behind(item, left))
        raise
    if left := _end_what_is_left(factories):
        from pytest_chvm.errors import StopFailedError

        raise StopFailedError(_left_behind(item, left))
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(request: pytest.FixtureRequest) -> Generator[None, object, object]:
    """Remember which fixture is being made: a clone of a snapshot that it starts ends with it."""
    making = request.config.stash[_making_key]
    making.append(request)
    try:
        return (yield)
    finally:
        making.pop()


def _at_end_of_caller(config: pytest.Config, end: Callable[[], None]) -> None:
    """Have something done at the end of what runs now: the fixture that is being made, the test, or a teardown."""
    if making := config.stash[_making_key]:
        making[-1].addfinalizer(end)
    elif _teardown_key in config.stash:
        config.stash[_teardown_key].callback(end)
    else:
        config.stash[_item_key].addfinalizer(end)


def _end_what_is_left(factories: list[VmFactory]) -> list[str]:
    return [what for factory in factories if factory.closed for what in factory.end_what_is_left()]


def _left_behind(item: pytest.Item, left: list[str]) -> str:
    return (
        f"{item.nodeid} has left behind: {', '.join(left)}. It should have been gone with the test's fixtures, and was ended now."
    )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the keeper process once the last fixture is gone, before the run's summary."""
    failures = _close_keepers(session.config)
    session.config.stash[_failures_key] += failures
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["chvm_failures"] = failures


def _close_keepers(config: pytest.Config) -> list[str]:
    """End the keepers of this run; those of the run around it go on."""
    processes = sys.modules.get("pytest_chvm.host.processes")
    level = config.stash.get(_level_key, None)
    if processes is None or (level is None and config.stash[_depth_key]):
        return []
    failures: list[str] = processes.close_keeper(level if config.stash[_depth_key] else None)
    return failures


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Remember the test that runs: a clone of a snapshot ends with it, whichever fixture the snapshot is from."""
    item.config.stash[_item_key] = item
    if _teardown_key in item.config.stash:
        del item.config.stash[_teardown_key]
    # It may be run again, by pytest-rerunfailures for instance.
    item.stash[_attempt_key] = item.stash.get(_attempt_key, 0) + 1
    item.stash[_failed_key] = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the consoles of a failed test's VMs into its report, and keep logs where that was asked for."""
    report = yield
    if report.failed and call.when != "teardown":
        _skip_where_asked_for(item, call, report)
    # Not its keywords: a directory's name is among them as well. Attributes reach xdist's controller.
    report.chvm_used = item.get_closest_marker("chvm") is not None  # type: ignore[attr-defined]
    factories = item.config.stash[_factories_key]
    if report.failed:
        item.stash[_failed_key] = True
    if factories and (report.failed or report.when == "teardown"):
        _report_vms(item, report, factories)
    return report


def _skip_where_asked_for(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
    """Turn what the machine lacks into a skip, where --chvm-missing=skip asks for that, wherever in the test it was found out."""
    # Without an import of ours there is no error of ours.
    if call.excinfo is None or item.config.stash[_settings_key].missing != "skip" or "pytest_chvm.errors" not in sys.modules:
        return
    from pytest_chvm.errors import MissingRequirementError

    error = call.excinfo.value
    if isinstance(error, MissingRequirementError):
        call.excinfo = pytest.CallInfo.from_call(lambda: pytest.skip(f"no VM here: {error}"), call.when).excinfo
        path, line, _name = item.reportinfo()
        report.outcome = "skipped"
        report.longrepr = (os.fspath(path), (line or 0) + 1, f"Skipped: no VM here: {error}")


def _report_vms(item: pytest.Item, report: pytest.TestReport, factories: list[VmFactory]) -> None:
    from pytest_chvm.report.sections import VmRecord, directory_of, keep_logs, sections_of

    settings = item.config.stash[_settings_key]
    # A template and the VM it was booted for have one log.
    vms = {vm.serial_log: vm for factory in factories for vm in factory.vms}
    records = [VmRecord(vm.name, vm.serial_log, vm.vmm_log, vm.origin.in_words) for vm in vms.values()]
    if report.failed:
        report.sections.extend(sections_of(records))
    if report.when == "teardown":
        failed = item.stash.get(_failed_key, False)
        if settings.keep == "always" or (settings.keep == "failed" and failed):
            place = directory_of(item.nodeid, _worker_of(item.config), item.stash.get(_attempt_key, 1))
            try:
                keep_logs(records, (settings.artifacts or item.config.rootpath / DEFAULT_ARTIFACTS) / place)
            except OSError as error:
                report.sections.append(("logs of VMs", f"they cannot be kept: {error}"))
        # Those of the session's go on, but for the clones that ended with this test.
        factories[:] = [factory for factory in factories if not factory.closed]
        for factory in factories:
            factory.forget_ended()


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the keeper process, if one is left, so that nothing outlives the run."""
    if config not in _configs:
        # It never got as far as ours.
        return
    _close_keepers(config)
    # Pytest has no summary after pytest.exit with a status of one's own, as SIGTERM has.
    _say_what_is_left(config)
    if (undo := config.stash.get(_undo_key, None)) is not None:
        undo.close()
    _configs.remove(config)
    if (sigterm := config.stash.get(_sigterm_key, None)) is not None:
        sigterm.let_go()


@pytest.fixture(scope="session")
def chvm_settings(pytestconfig: pytest.Config) -> Settings:
    """What the options resolved to."""
    return pytestconfig.stash[_settings_key]


@pytest.fixture(scope="session")
def chvm_driver(chvm_settings: Settings) -> VmDriver:
    """The driver in use."""
    from pytest_chvm.machine.launcher import driver_for

    return driver_for(chvm_settings)


@pytest.fixture(scope="session")
def chvm_kernel(request: pytest.FixtureRequest, chvm_settings: Settings) -> Path | None:
    """The kernel of --chvm-kernel that this run of the test is for; None for the built-in guest's."""
    if hasattr(request, "param"):
        kernel: Path = request.param
        return kernel
    return chvm_settings.kernel[0] if chvm_settings.kernel else None


@pytest.fixture
def chvm_vm(
    request: pytest.FixtureRequest, chvm_settings: Settings, chvm_kernel: Path | None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VmFactory]:
    """Factory of VMs that end with the test: `vm = chvm_vm(kernel=..., shared_dirs=...)` boots one and blocks until it is ready."""
    marks = [mark.kwargs for mark in request.node.iter_markers("chvm")]
    defaults = {key: value for kwargs in reversed(marks) for key, value in kwargs.items()}
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if len(chvm_settings.kernel) > 1 and "kernel" not in defaults and "chvm_kernel" not in parameters:
        request.node.warn(pytest.PytestWarning(f"{request.node.nodeid} {ONE_KERNEL_ONLY}: {chvm_kernel}"))
    longest_boot_s = _longest_boot_s(request.config, request.node)
    yield from _factory(request, chvm_settings, chvm_kernel, tmp_path_factory, request.node.name, defaults, longest_boot_s)


@pytest.fixture(scope="session")
def chvm_vm_factory(
    request: pytest.FixtureRequest, chvm_settings: Settings, chvm_kernel: Path | None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VmFactory]:
    """`chvm_vm` for fixtures of any other scope; its VMs end with the session."""
    longest_boot_s = _longest_boot_s(request.config)
    yield from _factory(request, chvm_settings, chvm_kernel, tmp_path_factory, "session", {}, longest_boot_s)


@pytest.fixture
def chvm_network(chvm_vm: VmFactory) -> Any:
    """Factory of isolated networks for several VMs of the test: `chvm_vm(networks=[net])`."""
    return chvm_vm.network


def _factory(
    request: pytest.FixtureRequest,
    settings: Settings,
    kernel: Path | None,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    defaults: dict[str, Any],
    longest_boot_s: float | None,
) -> Iterator[VmFactory]:
    from functools import cache

    from pytest_chvm.plugin.factory import VmFactory

    _expect_vms(request.config, request.session)
    _begin_run(request.config)
    item = request.config.stash[_item_key]
    if item.get_closest_marker("chvm") is None:
        # It was not seen to use a VM when it was collected (`getfixturevalue`).
        item.add_marker("chvm")
    if kernel is not None:
        defaults = {"kernel": kernel, **defaults}
    log_dir = cache(lambda: tmp_path_factory.mktemp("chvm"))
    factory = VmFactory(
        settings,
        name=name,
        namespace=_worker_of(request.config),
        log_dir=log_dir,
        defaults=defaults,
        longest_boot_s=longest_boot_s,
        at_end_of_caller=lambda end: _at_end_of_caller(request.config, end),
        test=getattr(request.node, "nodeid", None) or "(session)",
    )
    request.config.stash[_factories_key].append(factory)
    try:
        yield factory
    finally:
        factory.close()


def _worker_of(config: pytest.Config) -> str:
    """Return which of its run's processes this one is, `main` without xdist; a run within a test is not its test's."""
    worker: str = getattr(config, "workerinput", {}).get("workerid", "main")
    depth = config.stash[_depth_key]
    return f"{worker}-within{depth}" if depth else worker


def _begin_run(config: pytest.Config) -> None:
    """Have what is started from now on belong to this run; one within a test has a keeper of its own."""
    if _level_key in config.stash:
        return
    from pytest_chvm.base.progress import show_progress_with
    from pytest_chvm.host.keeper.remains import boot_id
    from pytest_chvm.host.runs import Run, begin_run, end_run
    from pytest_chvm.model import ProcessIdentity

    given = _worker_input(config)
    # A worker may be on another machine.
    here = given.get("boot_id") == boot_id()
    controller = ProcessIdentity(**given["controller"]) if here else None
    journal = Path(given["journal"]) if here and "journal" in given else None
    undo = config.stash[_undo_key] = ExitStack()
    run = Run(_run_id(config), _worker_of(config), controller, journal)
    level = config.stash[_level_key] = begin_run(run, within=config.stash[_depth_key] > 0)
    undo.callback(end_run, level)
    if capture := config.pluginmanager.get_plugin("capturemanager"):
        undo.callback(show_progress_with, show_progress_with(capture.global_and_fixture_disabled))


def _longest_boot_s(config: pytest.Config, item: pytest.Item | None = None) -> float | None:
    """Return how long a boot may take to fail before pytest-timeout does: it ends in its own report; None: as long as it likes."""
    mark = item.get_closest_marker("timeout") if item is not None else None
    limit = (mark.args[0] if mark.args else mark.kwargs.get("timeout")) if mark else None
    if limit is None and config.pluginmanager.hasplugin("timeout"):
        # As pytest-timeout itself looks for it.
        limit = config.getoption("timeout")
        if limit is None:
            limit = os.environ.get("PYTEST_TIMEOUT") or config.getini("timeout")
    return float(limit) * 0.8 if limit and float(limit) > 0 else None

"""Runs tests with the real Cloud Hypervisor in the lab where there is no KVM, as if they had run here: a pytest plugin.

A test is for the lab whose parameter `vmm` is "cloud-hypervisor", or that is marked `in_lab`. The tests of a file go there
together, when the first of them is due. The run inside writes each report to a file and the run outside reads them back, so that
a failure is shown with its own traceback and consoles, and is counted as what it is.
"""

import functools
import json
import os
import signal
import sys

import pytest

from pytest_chvm import InvalidConfigError
from pytest_chvm.drivers.cloud_hypervisor.driver import CloudHypervisorDriver
from pytest_chvm.host.kvm import why_no_kvm

CLOUD_HYPERVISOR = "cloud-hypervisor"
REPORTS = "CHVM_TEST_REPORTS"
# A kernel for the lab, to run the tests with another than the built-in guest's.
KERNEL = "CHVM_TEST_LAB_KERNEL"
LAB_TIMEOUT_S = 1800
NOT_RUN = "not run with the real Cloud Hypervisor"
_results_key = pytest.StashKey[dict]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report):
    if report.skipped and isinstance(report.longrepr, tuple) and NOT_RUN in report.longrepr[2]:
        # One place for all, so that the summary has one line for them, with their number.
        report.longrepr = (__file__, 1, report.longrepr[2])
    path = os.environ.get(REPORTS)
    if path and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(path, "a") as file:
            file.write(json.dumps(_config.hook.pytest_report_to_serializable(config=_config, report=report)) + "\n")


def pytest_configure(config):
    global _config
    _config = config
    config.addinivalue_line("markers", "in_lab: needs of the host what the lab has")


def run_in_lab(config, directory, node_ids):
    """Return the reports of the tests, by node id, and what the lab's pytest printed."""
    import subprocess

    directory.mkdir(parents=True, exist_ok=True)
    reports_file = directory / "reports.jsonl"
    command = [sys.executable, "-m", "pytest_chvm.cli", "lab", "--timeout", str(LAB_TIMEOUT_S), "--rw", str(directory)]
    command += ["--kernel", os.environ[KERNEL], "--"] if KERNEL in os.environ else ["--"]
    command += ["env", f"{REPORTS}={reports_file}"]
    command += [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-q",
        *node_ids,
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    # The first test of a file waits for the whole file: pytest-timeout's limit for one test is not meant for that.
    signal.setitimer(signal.ITIMER_REAL, 0)
    done = subprocess.run(
        command,
        cwd=config.rootpath,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    reports = {}
    if reports_file.exists():
        for line in reports_file.read_text().splitlines():
            report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
            # JSON knows no tuples, and pytest's summary of skips wants one.
            report.longrepr = tuple(report.longrepr) if isinstance(report.longrepr, list) else report.longrepr
            reports.setdefault(report.nodeid, []).append(report)
    return reports, f"the lab ended with status {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def is_inside():
    """Tell whether this is the run inside the lab."""
    return REPORTS in os.environ


def require_binary():
    """Skip, or fail where CHVM_REQUIRE_CLOUD_HYPERVISOR is set, a test that needs the real Cloud Hypervisor where there is none."""
    if reason := why_no_binary():
        if os.environ.get("CHVM_REQUIRE_CLOUD_HYPERVISOR"):
            pytest.fail(f"CHVM_REQUIRE_CLOUD_HYPERVISOR is set, and {reason}")
        pytest.skip(f"{NOT_RUN}: {reason}")


@functools.cache
def why_no_binary():
    """Return why the real Cloud Hypervisor cannot be had here, and what to do."""
    try:
        CloudHypervisorDriver().binary()
    except InvalidConfigError as error:
        return str(error)
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    """Report what the lab's run of this test reported, where it is one for the lab."""
    if not _is_for_lab(item):
        return None
    results = item.config.stash.setdefault(_results_key, {})
    if item.path not in results:
        here = [other.nodeid for other in item.session.items if other.path == item.path and _is_for_lab(other)]
        directory = item.config._tmp_path_factory.mktemp(f"lab-{item.path.stem}")
        results[item.path] = run_in_lab(item.config, directory, here)
    reports, said = results[item.path]
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports.get(item.nodeid) or [_missing(item, said)]:
        item.ihook.pytest_runtest_logreport(report=report)
    # The test before kept what this one could have shared with it; it is this one's to take down.
    item.session._setupstate.teardown_exact(nextitem)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _is_for_lab(item):
    callspec = getattr(item, "callspec", None)
    vmm = callspec.params.get("vmm") if callspec is not None else None
    if vmm == CLOUD_HYPERVISOR and why_no_binary():
        return False
    wants = vmm == CLOUD_HYPERVISOR or item.get_closest_marker("in_lab") is not None
    return wants and not is_inside() and why_no_kvm() is not None


def _missing(item, said):
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords={},
        outcome="failed",
        longrepr=f"the lab's run has no report of this test; {said}",
        when="call",
    )

"""Runs the Cloud Hypervisor half of a test file in the lab, and has its reports appear as if the tests had run here.

Loaded as a plugin by the run inside (`-p tests.behaviour.relay`), which writes each report to a file; the run outside reads
them back. So a failure inside is shown with its own traceback and consoles, and is counted as what it is.
"""

import json
import os
import signal
import sys

REPORTS = "CHVM_TEST_REPORTS"
# A kernel for the lab, to run the tests with another than the built-in guest's.
KERNEL = "CHVM_TEST_LAB_KERNEL"
LAB_TIMEOUT_S = 900


def pytest_runtest_logreport(report):
    path = os.environ.get(REPORTS)
    if path and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(path, "a") as file:
            file.write(json.dumps(_config.hook.pytest_report_to_serializable(config=_config, report=report)) + "\n")


def pytest_configure(config):
    global _config
    _config = config


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
        "tests.behaviour.relay",
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

"""psutil's own tests, unchanged, on the host and in a guest (`inside="module"`): what each test does here and there.

    python benchmarks/public_suite.py [test_linux.py ...]

The tests are those of the psutil that is installed, from its source package, which pip fetches. psutil's tests are safe on the
host: they look, and what they change is their own.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path

# Marks all tests of a run, in place of a line in each file.
MARKS = """
import pytest

def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.chvm(inside="module"))
"""


def fetch_tests(directory: Path) -> None:
    """Put the tests of the installed psutil's source package into a directory, without its modules, which are not compiled."""
    package = f"psutil=={version('psutil')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "psutil", package]
    subprocess.run(command, cwd=directory, check=True)
    (archive,) = directory.glob("psutil-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    (source,) = (path for path in directory.glob("psutil-*") if path.is_dir())
    shutil.move(source / "tests", directory / "tests")
    shutil.rmtree(source)


def outcomes(directory: Path, files: list[str], *arguments: str) -> tuple[dict[str, str], float]:
    """Run the tests; returns what each did, by its name, and how many seconds all took."""
    results = directory / "results.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
        f"--rootdir={directory}",
    ]
    command += [f"--junitxml={results}", *arguments, *(f"tests/{file}" for file in files)]
    started = time.monotonic()
    subprocess.run(command, cwd=directory, check=False, stdout=sys.stderr)
    took_s = time.monotonic() - started
    found: dict[str, str] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        found[f"{case.get('classname')}::{case.get('name')}"] = kinds.pop() if kinds else "passed"
    return found, took_s


def main() -> None:
    """Run them here and there, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=["test_linux.py"])
    files = parser.parse_args().files
    with tempfile.TemporaryDirectory(prefix="chvm-suite-") as name:
        directory = Path(name)
        fetch_tests(directory)
        (directory / "marks_inside.py").write_text(MARKS)
        host, host_s = outcomes(directory, files)
        guest, guest_s = outcomes(directory, files, "-p", "marks_inside")
    print(f"psutil {version('psutil')}: {', '.join(files)}")
    for where, found, took_s in (("host", host, host_s), ("inside", guest, guest_s)):
        counts = Counter(found.values())
        said = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        print(f"{where:7} {len(found)} tests in {took_s:.0f} s: {said}")
    for test in sorted(host.keys() | guest.keys()):
        if host.get(test) != guest.get(test):
            print(f"  {test}: {host.get(test)} on the host, {guest.get(test)} inside")


if __name__ == "__main__":
    main()

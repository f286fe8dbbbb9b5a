"""The program in the guest: a pytest that runs the tests it is asked for. Run as a script by the same Python as out there.

    program.py DIRECTORY

The directory has `job` (JSON, made by `session.py`) and two FIFOs: `ask`, a line of JSON for each test, and `answer`, a document of
JSON for each phase of a test.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(directory: str) -> int:
    """Run pytest as the job says; returns its exit status."""
    with open(os.path.join(directory, "job")) as file:
        job = json.load(file)
    sys.path[:] = job["path"]
    sys.argv[:] = job["argv"]
    # Before anything that is to be measured is imported.
    coverage = _start_coverage(directory, job["coverage"]) if job["coverage"] is not None else None
    import pytest

    from pytest_chvm.plugin.inside.guest import Guest

    return int(pytest.main(job["args"], plugins=[Guest(directory, job, coverage)]))


def _start_coverage(directory: str, options: dict[str, Any]) -> Any:
    import coverage

    measuring = coverage.Coverage(data_file=os.path.join(directory, "coverage"), **options)
    measuring.start()
    return measuring


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

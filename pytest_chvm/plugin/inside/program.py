"""The program in the guest: a pytest that runs the tests it is asked for. Run as a script by the same Python as out there.

    program.py run DIRECTORY     start, and do the job in the directory
    program.py wait ARGUMENT...  import all that any job needs, and do those of the directories that are named on descriptor 3
    program.py list ARGUMENT...  out here: print which files the one before needs, as JSON

A directory has `job` (JSON, made by `session.py`) and two FIFOs: `ask`, a line of JSON for each phase of a test, and `answer`, one
back. One that waits was started before its guest was saved, in a root of its own with those files; a job is done by a child of it,
in the mount namespace of the guest's commands.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# Lines with the directories of jobs; the guest's first root; where to say that it waits.
ASKED_FD, ROOT_FD, READY_FD = 3, 4, 5
NAMESPACE = "lib/chvm/root.ns"


def run(directory: str) -> int:
    """Run pytest as a job says; returns its exit status."""
    with open(os.path.join(directory, "job")) as file:
        job = json.load(file)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["place"])
    os.umask(job["mask"])
    sys.path[:] = job["path"]
    sys.argv[:] = job["argv"]
    sys.pycache_prefix = job["pycache_prefix"]
    sys.dont_write_bytecode = job["dont_write_bytecode"]
    # Before anything that is to be measured is imported.
    coverage = _start_coverage(directory, job["coverage"]) if job["coverage"] is not None else None
    import pytest

    guest = _guest().Guest(directory, job, coverage)
    return int(pytest.main(job["args"], plugins=[guest]))


def _guest() -> Any:
    """Return the module `guest.py`, not as one of its package, which pytest is still to load and rewrite as its plugin."""
    import importlib.util

    name = "pytest_chvm_inside_guest"
    if name not in sys.modules:
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "guest.py")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def _start_coverage(directory: str, options: dict[str, Any]) -> Any:
    import coverage

    measuring = coverage.Coverage(data_file=os.path.join(directory, "coverage"), **options)
    measuring.start()
    return measuring


def load(arguments: list[str]) -> None:
    """Import what any job needs, by running a test that does nothing with all the plugins that are installed."""
    import pytest

    _guest()
    _remember_distributions()
    example = os.path.join(os.path.dirname(os.path.abspath(__file__)), "example.py")
    place = os.path.dirname(example)
    pytest.main([*arguments, "-q", "-p", "no:cacheprovider", "--noconftest", f"--rootdir={place}", "-c", os.devnull, example])
    # By name, now that pytest has rewritten what it wants of the package.
    from pytest_chvm.plugin.inside import wire  # noqa: F401


def _remember_distributions() -> None:
    """Keep in memory what is installed, with its entry points: to read that takes long in a guest. `guest.py` undoes it."""
    import functools
    import importlib.metadata

    found = list(importlib.metadata.distributions())
    for distribution in found:
        distribution.read_text = functools.lru_cache(distribution.read_text)  # type: ignore[method-assign]
    original = importlib.metadata.distributions

    def distributions(**arguments: Any) -> Any:
        return original(**arguments) if arguments else iter(found)

    distributions.original = original  # type: ignore[attr-defined]
    importlib.metadata.distributions = distributions


def wait() -> None:
    """Do jobs, each in a child, for ever."""
    import random

    os.write(READY_FD, b"ready\n")
    os.close(READY_FD)
    with open(ASKED_FD) as lines:
        while line := lines.readline():
            if os.fork() == 0:
                random.seed()
                os.setsid()
                _supervise(line.strip())


def _supervise(directory: str) -> None:
    """Have a job done by a child, and tell whoever asks for more when that has ended."""
    _enter_namespace()
    ask = os.open(f"{directory}/ask", os.O_RDWR)
    pid = os.fork()
    if pid == 0:
        for fd in (ASKED_FD, ROOT_FD, ask):
            os.close(fd)
        os.dup2(os.open(f"{directory}/out", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 1)
        os.dup2(1, 2)
        _end(run(directory))
    _pid, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    while True:
        with open(f"{directory}/answer", "w") as answer:
            answer.write(json.dumps({"ended": code}) + "\n")
        while os.read(ask, 1) != b"\n":
            pass


def _enter_namespace() -> None:
    import importlib
    import linecache

    namespace = os.open(NAMESPACE, os.O_RDONLY, dir_fd=ROOT_FD)
    if hasattr(os, "setns"):
        os.setns(namespace)
    else:
        import ctypes

        if ctypes.CDLL(None, use_errno=True).setns(namespace, 0):
            raise OSError(ctypes.get_errno(), "setns")
    os.close(namespace)
    os.chdir("/")
    # What is known of directories is of the other root.
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()
    linecache.clearcache()


def _end(status: int) -> None:
    """End as an interpreter does."""
    sys.exit(status)


def files(arguments: list[str]) -> list[str]:
    """Return which files `load` needs, and the interpreter, by what is opened and mapped."""
    opened: set[str] = set()

    def note(event: str, values: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(values[0], str) and not (isinstance(values[1], str) and set(values[1]) & set("wax+")):
            opened.add(os.path.abspath(values[0]))

    sys.addaudithook(note)
    load(arguments)
    found = {os.path.abspath(sys.executable), "/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1", "/etc/ld.so.cache"}
    # What was imported from its compiled file is looked at all the same.
    found |= {path for module in list(sys.modules.values()) if isinstance(path := getattr(module, "__file__", None), str)}
    found |= {path for module in list(sys.modules.values()) if isinstance(path := getattr(module, "__cached__", None), str)}
    with open("/proc/self/maps") as maps:
        mapped = {line.split(None, 5)[5].strip() for line in maps if "/" in line}
    found |= mapped | _links_to(mapped)
    found.add(os.path.join(sys.prefix, "pyvenv.cfg"))
    for directory in sys.path:
        if os.path.isdir(directory):  # noqa: PTH112
            found |= {os.path.join(directory, name) for name in os.listdir(directory) if name.endswith(".pth")}
    return sorted(path for path in found | opened if os.path.isfile(path) and not path.startswith(("/proc/", "/sys/", "/dev/")))


def _links_to(mapped: set[str]) -> set[str]:
    """Return the links beside libraries that lead to them: the linker looks for those."""
    directories = {os.path.dirname(path) for path in mapped if ".so" in path}
    beside = {os.path.join(directory, name) for directory in directories for name in os.listdir(directory) if ".so" in name}
    return {path for path in beside if os.path.islink(path) and os.path.realpath(path) in mapped}  # noqa: PTH114


if __name__ == "__main__":
    # Its own directory, where names are that others have.
    del sys.path[0]
    what, *arguments = sys.argv[1:]
    if what == "run":
        sys.exit(run(*arguments))
    elif what == "list":
        stdout = os.dup(1)
        os.dup2(2, 1)
        listed = files(arguments)
        with open(stdout, "w") as out:
            json.dump(listed, out)
    else:
        load(arguments)
        # Not below it: a frame of this is then in each traceback.
        wait()

"""The program in the guest: a pytest that runs the tests it is asked for. Run as a script by the same Python as out there.

    program.py run DIRECTORY     do the job in the directory
    program.py wait ARGUMENT...  import all that any job needs, and do the one that descriptor 3 gives
    program.py list ARGUMENT...  out here: print which files the one before needs, as JSON

A job is a line of JSON, made by `session.py`; its tests are asked for by two FIFOs of a directory: `ask`, a line of JSON for each
phase of a test, and `answer`, one back. A program that waits was started before its guest was saved, in a root of its own that has
those files; for its job it goes to the mount namespace of the guest's commands.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# Of a program that waits: what it is asked for, the FIFO of the directory; the guest's first root; where to say that it waits.
ASK_FD, ROOT_FD, READY_FD = 3, 4, 5
DIRECTORY = "/run/chvm/resident"
NAMESPACE = "lib/chvm/root.ns"


def run(job: dict[str, Any], directory: str) -> int:
    """Run pytest as a job says, asked by the FIFOs of a directory; returns its exit status."""
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["place"])
    os.umask(job["mask"])
    sys.path[:] = job["path"]
    sys.argv[:] = job["argv"]
    sys.pycache_prefix = job["pycache_prefix"]
    sys.dont_write_bytecode = job["dont_write_bytecode"]
    # Before anything that is to be measured is imported.
    coverage = _start_coverage(job["directory"], job["coverage"]) if job["coverage"] is not None else None
    import pytest

    guest = _module("guest").Guest(directory, job, coverage)
    return int(pytest.main(job["args"], plugins=[guest]))


def _module(name: str) -> Any:
    """Return a module beside this one, not as one of its package, which pytest is still to load and rewrite as its plugin."""
    import importlib.util

    known = f"pytest_chvm_inside_{name}"
    if known not in sys.modules:
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{name}.py")
        spec = importlib.util.spec_from_file_location(known, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[known]


def _start_coverage(directory: str, options: dict[str, Any]) -> Any:
    import coverage

    measuring = coverage.Coverage(data_file=os.path.join(directory, "coverage"), **options)
    measuring.start()
    return measuring


def load(arguments: list[str]) -> None:
    """Import what any job needs, by running a test that does nothing with all the plugins that are installed."""
    import pytest

    _module("guest")
    _module("remembered").remember()
    example = os.path.join(os.path.dirname(os.path.abspath(__file__)), "example.py")
    place = os.path.dirname(example)
    arguments = [*arguments, "-q", "-p", "no:cacheprovider", "--noconftest", f"--rootdir={place}", "-c", os.devnull, example]
    pytest.main(arguments, plugins=[_module("guest").Example()])
    if not hasattr(os, "setns"):
        import ctypes  # noqa: F401
    # By name, now that pytest has rewritten what it wants of the package.
    from pytest_chvm.plugin.inside import wire  # noqa: F401


def wait() -> dict[str, Any]:
    """Wait for a job, and make ready for it what is not to be the same in each clone; returns it."""
    import gc

    # What is there by now stays: it would be looked through again and again.
    gc.collect()
    gc.freeze()
    os.write(READY_FD, b"ready\n")
    os.close(READY_FD)
    with open(ASK_FD, buffering=1, errors="surrogateescape") as lines:
        job: dict[str, Any] = json.loads(lines.readline())
    try:
        _enter_namespace()
    except OSError:
        # Not with threads, such as a plugin has started: a child has none.
        if pid := os.fork():
            _end_as(pid)
        _enter_namespace()
    os.close(ROOT_FD)
    os.setsid()
    sys.stdout.flush()
    os.ftruncate(1, 0)
    os.mkdir(job["directory"], mode=0o700)  # noqa: PTH102
    _start_anew()
    return job


def _end_as(pid: int) -> None:
    """End as a child does."""
    _pid, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _start_anew() -> None:
    """Have what a process draws or is told when it starts: what was saved is the same in each clone."""
    import random
    import signal

    random.seed()
    if (tempfile := sys.modules.get("tempfile")) is not None:
        tempfile._name_sequence = None  # type: ignore[attr-defined]
    if (ssl := sys.modules.get("ssl")) is not None:
        ssl.RAND_add(os.urandom(32), 32.0)
    # As a program in the background of a shell it has them ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def _enter_namespace() -> None:
    import importlib
    import linecache

    namespace = os.open(NAMESPACE, os.O_RDONLY, dir_fd=ROOT_FD)
    try:
        if hasattr(os, "setns"):
            os.setns(namespace)
        else:
            import ctypes

            if ctypes.CDLL(None, use_errno=True).setns(namespace, 0):
                raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(namespace)
    os.chdir("/")
    # What is known of directories is of the other root.
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()
    linecache.clearcache()


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
        with open(os.path.join(*arguments, "job")) as file:
            given = json.load(file)
        sys.exit(run(given, *arguments))
    elif what == "list":
        stdout = os.dup(1)
        os.dup2(2, 1)
        listed = files(arguments)
        with open(stdout, "w") as out:
            json.dump(listed, out)
    else:
        load(arguments)
        sys.exit(run(wait(), DIRECTORY))

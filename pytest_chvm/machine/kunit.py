"""KUnit, the kernel's unit tests: they run when the kernel boots or a module is loaded, and say how it went in the kernel's log."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from pytest_chvm.base.untouched import random_hex
from pytest_chvm.errors import InvalidConfigError, UnsupportedError, VmIOError
from pytest_chvm.machine.vm import Vm

BEGIN = re.compile(r"K?TAP version \d+$", re.M)
LOAD_TIMEOUT_S = 300.0
# Before all that it has said of itself, the kernel says which one it is.
FIRST_OF_BOOT = "Linux version "


def boot_log(vm: Vm) -> str:
    """Return the kernel log of a VM from where KUnit begins; raises UnsupportedError where it ran nothing or that is lost."""
    log = _log(vm)
    if (found := BEGIN.search(log)) is None or FIRST_OF_BOOT not in log[: found.start()]:
        why = "it has run none at boot: it needs CONFIG_KUNIT=y and tests that are built in"
        if FIRST_OF_BOOT not in log:
            why = "its log has lost its beginning: give it a larger one, cmdline_extra='log_buf_len=4M'"
        raise UnsupportedError(f"VM {vm.name!r}: the kernel's log has no KUnit tests of its boot: {why}", vm_name=vm.name)
    return log[log.rfind("\n", 0, found.start()) + 1 :]


def log_of_module(vm: Vm, module: Path) -> str:
    """Load a module, which runs its KUnit tests, and return what the kernel has said meanwhile.

    Raises InvalidConfigError where there is no such file, UnsupportedError where the kernel does not take it, VmIOError where the
    log has lost the beginning.
    """
    if not module.is_file():
        raise InvalidConfigError(f"VM {vm.name!r}: there is no module {str(module)!r}", vm_name=vm.name)
    token = f"chvm-{random_hex(8)}"
    place = f"/tmp/{token}"
    vm.put(module, place)
    loaded = vm.run(
        f"echo {token} >/dev/kmsg; modprobe kunit 2>/dev/null; insmod {shlex.quote(place)}; status=$?; rm {place}; exit $status",
        timeout=LOAD_TIMEOUT_S,
    )
    if loaded.returncode != 0:
        raise UnsupportedError(
            f"VM {vm.name!r}: its kernel does not take {module.name}: {loaded.stderr.strip()[-500:]}", vm_name=vm.name
        )
    log = _log(vm)
    if token not in log:
        raise VmIOError(
            f"VM {vm.name!r}: what KUnit said of {module.name} is no longer in the kernel's log: cmdline_extra='log_buf_len=4M'",
            vm_name=vm.name,
        )
    return log[log.index("\n", log.rindex(token)) + 1 :]


def _log(vm: Vm) -> str:
    return vm.check_output("dmesg")

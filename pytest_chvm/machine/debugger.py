"""What is known of a guest beside what it says of itself: its memory as a file, and a debugger attached to it."""

from __future__ import annotations

import os
from pathlib import Path

from pytest_chvm.drivers.boot import GDB_SOCKET
from pytest_chvm.errors import UnsupportedError, VmError, VmIOError
from pytest_chvm.machine.machine import Machine


def dump_memory(machine: Machine, target: Path) -> Path:
    """Write a guest's memory to an ELF core; see `Vm.dump_memory`."""
    if machine.health.has_ended():
        raise VmIOError(f"VM {machine.name!r}: its memory went with its VMM, which has ended", vm_name=machine.name)
    # As an absolute path, whatever the VMM's directory is.
    target = Path(os.path.abspath(target))
    if not target.parent.is_dir():
        raise VmIOError(
            f"VM {machine.name!r}: its memory cannot be written to {str(target)!r}: there is no such directory",
            vm_name=machine.name,
        )
    machine.driver.dump_memory(machine.handle, target)
    return target


def gdb_command(machine: Machine) -> list[str]:
    """Return the command that attaches gdb to a VM; see `Vm.gdb_command`."""
    if not machine.config.gdb or machine.handle.run_dir is None:
        raise UnsupportedError(f"VM {machine.name!r} is for no debugger: start it with gdb=True", vm_name=machine.name)
    symbols = _symbols(machine)
    attach = f"target remote {machine.handle.run_dir / GDB_SOCKET}"
    return ["gdb", "-ex", attach, *([os.fspath(symbols)] if symbols else [])]


def _symbols(machine: Machine) -> Path | None:
    """Return the `vmlinux` with debug information of its kernel, where that is known."""
    from pytest_chvm.guest.symbols import debug_kernel
    from pytest_chvm.machine.kernel import kernel_of

    try:
        kernel = kernel_of(machine)
    except VmError:
        return None
    return None if kernel is None else debug_kernel(kernel)

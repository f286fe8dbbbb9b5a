"""Modules of a test's own in a guest's kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pytest_chvm.base.untouched import random_hex
from pytest_chvm.errors import GuestCommandError, InvalidConfigError, UnsupportedError
from pytest_chvm.guest.kernels.module_file import ModuleFile, read_module
from pytest_chvm.machine.kernel import GuestKernel
from pytest_chvm.machine.machine import Machine

# Of what the kernel has said about a module that it did not take.
MOST_LINES = 20


def load(machine: Machine, file: Path, parameters: Mapping[str, object], write: Callable[[str, bytes], None]) -> str:
    """Load a module's file of the host's, after what it needs of the kernel's own; returns its name.

    `write` writes a file of the guest's. Raises InvalidConfigError for a file that is no module of the guest's kernel, and
    GuestCommandError with what the kernel says where it does not take it.
    """
    try:
        module = read_module(file)
        words = [f"{name}={_value(value)}" for name, value in parameters.items()]
    except InvalidConfigError as error:
        raise InvalidConfigError(f"VM {machine.name!r}: {error}", vm_name=machine.name) from None
    _check_release(machine, file, module)
    place = f"/tmp/chvm-{random_hex(8)}.ko"
    try:
        for needed in module.needs:
            machine.check_succeeded(machine.run(["modprobe", needed], input=None))
        seen = len(machine.dmesg())
        write(place, module.data)
        done = machine.run(["insmod", place, *words], input=None)
        if done.returncode != 0:
            said = "\n".join(message.text for message in machine.dmesg()[seen:][-MOST_LINES:])
            raise GuestCommandError(
                f"VM {machine.name!r}: its kernel did not take the module {str(file)!r}: {done.stderr.strip()[:300]}\n"
                f"the kernel says: {said or 'nothing'}",
                vm_name=machine.name,
                returncode=done.returncode,
                stdout=done.stdout,
                stderr=done.stderr,
            )
    finally:
        if not machine.ended:
            machine.run(["rm", "-f", place], input=None)
    return module.name


def _check_release(machine: Machine, file: Path, module: ModuleFile) -> None:
    release = GuestKernel(machine).release
    if module.release != release:
        raise InvalidConfigError(
            f"VM {machine.name!r}: the module {str(file)!r} was built for kernel {module.release}, and this VM's is {release}, "
            "which does not load it: build it against that one, or boot the VM with kernel= of the tree that it was built in",
            vm_name=machine.name,
        )
    modules = machine.run("[ -e /proc/modules ]", input=None)
    if modules.returncode != 0:
        raise UnsupportedError(f"VM {machine.name!r}: its kernel loads no modules: it needs CONFIG_MODULES", vm_name=machine.name)


def _value(value: object) -> str:
    """Return a parameter's value as kernels read it: truth as 1 and 0, several with commas."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list | tuple):
        return ",".join(map(_value, value))
    text = str(value)
    if any(character in text for character in '"\0\n'):
        raise InvalidConfigError(f"the parameter {text!r}: a kernel reads no quotes, newlines or NULs in one")
    return f'"{text}"' if " " in text else text

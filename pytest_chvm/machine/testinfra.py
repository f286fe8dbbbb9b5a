"""A VM as a host of pytest-testinfra's: a backend of ours runs its commands with `Vm.run`, so that no network is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_chvm.errors import MissingRequirementError
from pytest_chvm.machine.machine import RUN_TIMEOUT_S

if TYPE_CHECKING:
    from testinfra.host import Host

    from pytest_chvm.machine.commands import GuestCommands


def testinfra_host(vm: GuestCommands, name: str) -> Host:
    """Return a VM as a host of pytest-testinfra's; raises MissingRequirementError where that is not installed."""
    try:
        from testinfra.backend.base import BaseBackend, CommandResult
        from testinfra.host import Host
    except ImportError as error:
        raise MissingRequirementError(
            f"VM {name!r}: vm.testinfra needs pytest-testinfra, which cannot be imported ({error}): "
            "pip install 'pytest-chvm[testinfra]'",
            vm_name=name,
        ) from error

    class ShellBackend(BaseBackend):  # type: ignore[misc]
        """Runs what testinfra asks with `Vm.run`; outputs and paths are UTF-8, other bytes by `surrogateescape`, as there."""

        NAME = "chvm"
        encoding = "utf-8"

        def run(self, command: str, *args: str, **options: Any) -> CommandResult:
            """Run a command in the guest, its arguments quoted; `timeout` is seconds, as of `Vm.run`."""
            script = self.get_command(command, *args)
            done = vm.run(script, timeout=options.get("timeout", RUN_TIMEOUT_S))
            return self.result(done.returncode, self.encode(script), done.stdout_bytes, done.stderr_bytes)

        def decode(self, data: bytes) -> str:
            return data.decode(errors="surrogateescape")

        def encode(self, data: str) -> bytes:
            return data.encode(errors="surrogateescape")

    backend = ShellBackend(name)
    host = Host(backend)
    backend.set_host(host)
    return host

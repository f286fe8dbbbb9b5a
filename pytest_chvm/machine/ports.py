"""How a test reaches the guest's TCP ports: at its own address, by a forwarding of the VMM's, or by a relay into a namespace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytest_chvm.base.steps import Step
from pytest_chvm.errors import UnsupportedError
from pytest_chvm.machine.machine import Machine
from pytest_chvm.model import check_port

if TYPE_CHECKING:
    from pytest_chvm.host.relay import NamespaceRelay

HIGHEST_TCP_PORT = (1 << 16) - 1


@dataclass(eq=False)
class Ports:
    """The ways to one VM's ports, each made once."""

    machine: Machine
    _relays: dict[int, NamespaceRelay] = field(default_factory=dict)
    _forwarded: dict[int, tuple[str, int]] = field(default_factory=dict)

    def address(self, port: int) -> tuple[str, int]:
        """Return a host and port that lead to a port of the guest's; see `Vm.address`."""
        machine = self.machine
        check_port(port, HIGHEST_TCP_PORT, machine.name)
        networks = machine.config.networks or ()
        if not networks:
            raise UnsupportedError(
                f"VM {machine.name!r} has no network: boot it with network='tap' or network='user'", vm_name=machine.name
            )
        if networks[0].forwarded:
            if port not in self._forwarded:
                self._forwarded[port] = machine.driver.forward_port(machine.handle, port)
            return self._forwarded[port]
        if machine.config.netns is not None:
            from pytest_chvm.host.relay import NamespaceRelay

            if port not in self._relays:
                self._relays[port] = NamespaceRelay(machine.config.netns, (machine.ip, port))
            return self._relays[port].address
        return machine.ip, port

    def closing(self) -> list[Step]:
        """Return the steps that end the relays."""
        return [relay.close for relay in self._relays.values()]

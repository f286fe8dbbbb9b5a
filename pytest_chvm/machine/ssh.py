"""SSH to a guest: a key of the run's, the guest's own key pinned, and no file of the user's read or written."""

from __future__ import annotations

import os
import shlex
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pytest_chvm.base.steps import Step
from pytest_chvm.errors import UnsupportedError
from pytest_chvm.guest import ssh
from pytest_chvm.guest.ssh import SshServer
from pytest_chvm.host.ssh_key import run_key
from pytest_chvm.machine.machine import Machine
from pytest_chvm.machine.ssh_relay import ShellRelay

LET_IN_TIMEOUT_S = 30.0
# Whatever the user's or the machine's configuration says: no questions, no agent, nobody's files, and no waiting for ever for a
# guest that is gone.
OPTIONS = {
    "BatchMode": "yes",
    "IdentitiesOnly": "yes",
    "IdentityAgent": "none",
    "StrictHostKeyChecking": "yes",
    "GlobalKnownHostsFile": os.devnull,
    "UpdateHostKeys": "no",
    "CheckHostIP": "no",
    "ConnectTimeout": "30",
    "ServerAliveInterval": "15",
    "LogLevel": "ERROR",
}


@dataclass(eq=False)
class Ssh:
    """The way to one VM's sshd; `address` leads to a port of the guest's."""

    machine: Machine
    address: Callable[[int], tuple[str, int]]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    # Of a VM without a network.
    _relay: ShellRelay | None = None
    _server: SshServer | None = None
    # Which of the guest's starts it is known of, and by which key.
    _known_of: tuple[int, str] = (0, "")

    def command(self, *arguments: str) -> list[str]:
        """Return the arguments of a program that logs into the guest; see `Vm.ssh_command`."""
        with self._lock:
            machine = self.machine
            key = run_key(machine.lease.host)
            known_hosts = machine.lease.directory / "known_hosts"
            known = (machine.starts, key.public)
            if self._server is None or self._known_of != known:
                self._server = self._let_in(key.public, known_hosts)
                self._known_of = known
            host, port = self._address(self._server)
        options = {
            **OPTIONS,
            "IdentityFile": _quoted(key.private),
            "UserKnownHostsFile": _quoted(known_hosts),
            # Not the address: it may be a forwarding's, and another VM has had it.
            "HostKeyAlias": machine.name,
        }
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return ["ssh", "-F", os.devnull, *words, "-p", str(port), f"root@{host}", *_remote(arguments)]

    def closing(self) -> list[Step]:
        """Return the step that ends the connections of a VM without a network."""
        return [self._relay.close] if self._relay else []

    def _address(self, server: SshServer) -> tuple[str, int]:
        if self.machine.config.networks:
            return self.address(server.port)
        self._relay = self._relay or ShellRelay(self.machine)
        return self._relay.address

    def _let_in(self, public_key: str, known_hosts: Path) -> SshServer:
        machine = self.machine
        server = ssh.let_in(
            lambda script, data: machine.run(script, input=data, timeout=LET_IN_TIMEOUT_S), public_key, machine.name
        )
        # Without a network each connection has an sshd of its own.
        if machine.config.networks and not server.listens:
            raise UnsupportedError(
                f"VM {machine.name!r} cannot be reached over SSH: the guest has an sshd, and nothing listens at its port "
                f"{server.port}: start it, by vm.run('systemctl start ssh') for instance. {ssh.INSTEAD}",
                vm_name=machine.name,
            )
        known_hosts.write_text("".join(f"{machine.name} {key}\n" for key in server.host_keys))
        return server


def _remote(arguments: tuple[str, ...]) -> list[str]:
    """Return what stands behind the destination: options of ssh's as they are, a program's arguments as one line for a shell."""
    if len(arguments) < 2 or arguments[0].startswith("-"):
        return list(arguments)
    return [shlex.join(arguments)]


def _quoted(path: Path) -> str:
    """Return a path as a value of ssh_config(5), where spaces part values and % begins a token."""
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'

"""The SSH server of a guest: having it let a key in, and what is to be known of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

from pytest_chvm.errors import UnsupportedError
from pytest_chvm.model import CommandResult

# A line of a public key's file (sshd(8), AUTHORIZED_KEYS FILE FORMAT), without its comment.
PUBLIC_KEY = re.compile(r"(?:[a-z0-9-]+(?:@openssh\.com)?) [A-Za-z0-9+/]{40,20000}={0,3}")
ROOT_MAY = ("yes", "prohibit-password", "without-password")
INSTEAD = "vm.run, vm.put and vm.get work without it"
# What the statuses of the script mean.
FAILURES = {
    3: "there is no sshd in the guest (on its PATH, in /usr/local/sbin, /usr/sbin or /sbin): install openssh-server in the image",
    4: "the guest's sshd would not start",
    5: "the guest's sshd reads no file of authorized keys (AuthorizedKeysFile none)",
}


@dataclass(frozen=True, slots=True)
class SshServer:
    """A guest's sshd: the port that it is set to, its public keys (type and key), and whether something listens at that port."""

    port: int
    host_keys: tuple[str, ...]
    listens: bool


def let_in(run: Callable[[str, bytes | None], CommandResult], public_key: str, vm_name: str) -> SshServer:
    """Have a guest's sshd let a key log in as root, by its root shell; `run` runs a command there, with an input.

    Raises UnsupportedError, in words, where there is no sshd, or one that lets root in by no key.
    """
    script = resources.files("pytest_chvm.guest").joinpath("ssh.sh").read_text()
    done = run(script, f"{public_key}\n".encode())
    if done.returncode != 0:
        what = FAILURES.get(done.returncode, f"the guest's root shell could not let the run's key in, status {done.returncode}")
        raise _unsupported(vm_name, f"{what}{f': {said}' if (said := done.stderr.strip()[:300]) else ''}")
    facts = [line.split(" ", 1) for line in done.stdout.splitlines() if " " in line]
    return _server(facts, vm_name)


def _server(facts: list[list[str]], vm_name: str) -> SshServer:
    def said(what: str) -> list[str]:
        return [value for name, value in facts if name == what]

    for setting, allowed in (("permitrootlogin", ROOT_MAY), ("pubkeyauthentication", ("yes",))):
        if not set(said(setting)) <= set(allowed):
            raise _unsupported(vm_name, f"the guest's sshd has '{setting} {said(setting)[0]}', and root is to log in by a key")
    keys = [found[0] for line in said("public") if (found := PUBLIC_KEY.match(line))]
    if not keys:
        raise _unsupported(vm_name, "the guest's sshd has no host key (ssh-keygen -A makes them)")
    port = int(next((port for port in said("port") if port.isdigit()), "22"))
    return SshServer(port, tuple(keys), f"{port:04X}" in said("listens"))


def _unsupported(vm_name: str, what: str) -> UnsupportedError:
    return UnsupportedError(f"VM {vm_name!r} cannot be reached over SSH: {what}. {INSTEAD}", vm_name=vm_name)

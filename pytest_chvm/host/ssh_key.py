"""SSH keys: the pair with which a run logs into its guests, and those by which each clone of a guest is known.

The first is made at the first use, in the run's own directory, and gone with it. The others are made here since a processor made of
software takes seconds for them.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pytest_chvm.errors import HostError, MissingRequirementError
from pytest_chvm.host.host import Host

PROGRAMS = ("ssh", "ssh-keygen")
KEYGEN_TIMEOUT_S = 30.0
# Those that take milliseconds; an RSA key takes a second.
HOST_KEY_TYPES = ("ed25519", "ecdsa")

_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class SshKey:
    """A key pair: the file of the private one (0600), and the public one as a line of `authorized_keys` without its end."""

    private: Path
    public: str


def run_key(host: Host) -> SshKey:
    """Return a run's key pair (Ed25519), made at the first call; MissingRequirementError where OpenSSH is missing."""
    private = host.keeper().directory / "ssh_key"
    public = private.with_suffix(".pub")
    with _lock:
        # The private one comes last: where it is, both are whole.
        if not private.exists():
            made = _make(private.with_suffix(".new"))
            made.with_suffix(".new.pub").replace(public)
            made.replace(private)
        return SshKey(private, public.read_text().strip())


def _make(file: Path) -> Path:
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        raise MissingRequirementError(
            f"{' and '.join(missing)} not found on PATH: install OpenSSH's client (Debian: openssh-client), or use vm.run"
        )
    with _making(file, "ed25519", "pytest-chvm") as process:
        try:
            said, _ = process.communicate(timeout=KEYGEN_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise HostError(f"ssh-keygen made no key within {KEYGEN_TIMEOUT_S:g} s in {str(file.parent)!r}") from error
    if process.returncode != 0:
        raise HostError(f"ssh-keygen made no key in {str(file.parent)!r}: {said.strip()[:200]}")
    return file


@dataclass(frozen=True, slots=True)
class HostKey:
    """A key by which a machine is known: the text of the private key's file, and of the public one's without its end."""

    type: str
    private: str
    public: str


def new_host_keys(directory: Path, machine: str) -> list[HostKey]:
    """Return new keys for a machine of that name, by way of files of a directory; none where they cannot be made here."""
    if shutil.which("ssh-keygen") is None:
        return []
    files = {key_type: directory / f"ssh_host_{key_type}_key" for key_type in HOST_KEY_TYPES}
    # At once: each of them mostly waits for its program to be loaded.
    running = {key_type: _making(file, key_type, f"root@{machine}") for key_type, file in files.items()}
    keys = []
    for key_type, process in running.items():
        with process, suppress(subprocess.TimeoutExpired, OSError):
            try:
                process.communicate(timeout=KEYGEN_TIMEOUT_S)
            finally:
                process.kill()
            file, public = files[key_type], files[key_type].with_suffix(".pub")
            if process.returncode == 0:
                keys.append(HostKey(key_type, file.read_text(), public.read_text().strip()))
            file.unlink(missing_ok=True)
            public.unlink(missing_ok=True)
    return keys


def _making(file: Path, key_type: str, comment: str) -> subprocess.Popen[str]:
    # What an interrupted call has left.
    file.unlink(missing_ok=True)
    command = ["ssh-keygen", "-q", "-t", key_type, "-N", "", "-C", comment, "-f", str(file)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")

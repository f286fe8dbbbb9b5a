"""The key pair with which a run logs into its guests: made at the first use, in the run's own directory, and gone with it."""

from __future__ import annotations

import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

from pytest_chvm.errors import HostError, MissingRequirementError
from pytest_chvm.host.host import Host

PROGRAMS = ("ssh", "ssh-keygen")
KEYGEN_TIMEOUT_S = 30.0

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
    # What an interrupted call has left.
    file.unlink(missing_ok=True)
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "pytest-chvm", "-f", str(file)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=KEYGEN_TIMEOUT_S, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise HostError(f"ssh-keygen made no key within {KEYGEN_TIMEOUT_S:g} s in {str(file.parent)!r}") from error
    if done.returncode != 0:
        raise HostError(f"ssh-keygen made no key in {str(file.parent)!r}: {(done.stderr or done.stdout).strip()[:200]}")
    return file

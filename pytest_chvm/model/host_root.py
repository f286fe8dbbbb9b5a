"""The host's own file system as a guest's root."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pytest_chvm.model.shares import SharedDir, checked_hidden
from pytest_chvm.model.values import StrPath

HOST_ROOT_TAG = "chvm-root"
# The guest has its own.
OWN = ("/dev", "/proc", "/run", "/sys")
# Of root, of every user with a home below /home, and of the user of this process.
HOMES = ("/root", "/home/*", "~")
IN_HOMES = (
    ".ssh", ".gnupg", ".password-store", ".local/share/keyrings", ".netrc", ".git-credentials", ".config/gh", ".config/hub",
    ".aws", ".azure", ".config/gcloud", ".boto", ".oci", ".terraform.d", ".vault-token", ".config/rclone", ".kube", ".docker",
    ".config/containers", ".npmrc", ".pypirc", ".cargo/credentials", ".cargo/credentials.toml", ".gem/credentials", ".pgpass",
    ".my.cnf", ".mozilla", ".config/google-chrome", ".config/chromium", ".thunderbird", ".*_history",
)  # fmt: skip
IN_SYSTEM = (
    "/etc/shadow", "/etc/shadow-", "/etc/gshadow", "/etc/gshadow-", "/etc/security/opasswd", "/etc/ssh/ssh_host_*_key",
    "/etc/ssl/private", "/etc/pki/tls/private", "/etc/letsencrypt/archive", "/etc/letsencrypt/live", "/etc/krb5.keytab",
    "/etc/wireguard", "/etc/ipsec.secrets", "/etc/swanctl/private", "/etc/NetworkManager/system-connections", "/etc/kubernetes",
    "/etc/rancher", "/var/lib/kubelet", "/etc/credstore", "/etc/credstore.encrypted", "/var/lib/systemd/credential.secret",
    "/var/lib/sss/secrets",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Resident:
    """A program that waits in the guest already when it is ready; a clone's was started before the saved VM was saved.

    `environment`: pairs of a name and a value. `files`: those of the host's that it has, at the same places, until it goes to the
    guest's root by the mount namespace `lib/chvm/root.ns` below its descriptor 4. It says that it waits by a line to descriptor 5.
    Descriptor 3 gives what it is asked for, a line each: it is the FIFO `ask` of `/run/chvm/resident`. The FIFO `answer` beside it
    takes its answers, and `out` has what it prints. Once it has ended that is the answer: `{"ended": STATUS}`.
    """

    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    files: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class HostRoot:
    """The host's file system as a guest's root, as `root="host"` has it: read-only, below a layer that goes with the VM.

    `hidden`: paths of the host's in whose place the guest finds something empty, as they are when the VM is started. `*` and the
    like stand for names, `~` for the user's home. By default `HostRoot.SECRETS`; to add one: `[*HostRoot.SECRETS, "/srv/keys"]`.
    Beside these, the host's `/dev`, `/proc`, `/run` and `/sys` are hidden; with an empty list nothing is.
    """

    SECRETS: ClassVar[tuple[str, ...]] = (*IN_SYSTEM, *(f"{home}/{name}" for home in HOMES for name in IN_HOMES))

    hidden: tuple[str, ...] = SECRETS
    # For this package's own use.
    resident: Resident | None = None

    if TYPE_CHECKING:

        def __init__(self, hidden: Sequence[StrPath] = ..., resident: Resident | None = None) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", checked_hidden("HostRoot", self.hidden))

    def share(self) -> SharedDir:
        """Return the shared dir that has it."""
        hidden = (*OWN, *self.hidden) if self.hidden else ()
        return SharedDir(HOST_ROOT_TAG, "/", read_only=True, cache="always", announce_submounts=False, hidden=hidden)

"""virtiofsd, which serves a directory of the host to a guest: finding it, its two dialects, starting it.

The Rust one (gitlab.com/virtio-fs/virtiofsd) and the C one that QEMU shipped until 7.2 (bookworm) take different
options for the same things.
"""

from __future__ import annotations

import glob
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pytest_chvm.base.deadline import Deadline
from pytest_chvm.base.watch import FileWatch
from pytest_chvm.errors import BootFailedError, HostError, InvalidConfigError, MissingRequirementError
from pytest_chvm.host.binaries import find_binary
from pytest_chvm.host.capabilities import missing
from pytest_chvm.host.host import Host
from pytest_chvm.host.keeper_client import Keeper
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.versions import Feature, lacks, program_of
from pytest_chvm.model import ServedShare, SharedDir

PROGRAMS = ("virtiofsd",)
PLACES = ("/usr/libexec", "/usr/lib/virtiofsd", "/usr/lib/qemu", "/usr/lib", "/usr/local/bin", "/usr/local/libexec")
INSTALL = (
    "install it with 'apt install virtiofsd' (Debian 13, Ubuntu 24.04 and newer), 'apt install qemu-system-common' (Debian 12, "
    "Ubuntu 22.04), 'dnf install virtiofsd', 'cargo install virtiofsd', or name one with --chvm-virtiofsd"
)
SOCKET_TIMEOUT_S = 5.0
# Besides, for what is hidden: dozens of mounts, each by a system call that an emulated host takes long for.
HIDING_TIMEOUT_S = 20.0
LISTEN_S = 0.001
TRIAL_TIMEOUT_S = 10.0
# A device node that a guest's root makes in a share would be one of the host's.
NO_DEVICE_NODES = "-mknod"
# For its sandbox, and to act for the guest's users (virtiofsd's src/main.rs keeps these).
NEEDED_AS_ROOT = (
    "CAP_SYS_CHROOT",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_SETFCAP",
)
# In a mount namespace of its own, since the C one writes below /run and may be asked for /. $0: the directory; $1: where its tree
# is mounted; $2: "ro" for one that has to be read-only by its mounts; $3: lines for `mount -a`, of what something empty is to hide.
MOUNT_SCRIPT = """
mkdir "$1" && mount -t tmpfs -o mode=0755,size=1m chvm "$1" && cd "$1" && mkdir -m 0700 tree empty || exit
:>nothing && chmod 0600 nothing && printf %s "$3" >fstab && mount --rbind "$0" tree || exit
[ "$2" = rw ] || while read -r _ _ _ _ where options _; do
    where=$(printf %b "$where")
    # With the options that it has: in a user namespace none of them may be taken away.
    case $where in "$1"/tree|"$1"/tree/*) mount -o "remount,bind,$options,ro" "$where" || exit ;; esac
done </proc/self/mountinfo
# What hides is not to be written either: each mount of it is read-only as the first one is.
mount -o remount,bind,ro "$1" && mount -a -T fstab && cd / && shift 3 && exec "$@"
"""
# Where the C one locks a file named after its socket, and leaves both behind.
STATE_DIR = Path("/var/run/virtiofsd")


@dataclass(frozen=True, slots=True)
class Virtiofsd:
    """A virtiofsd on this host, which of the two it is, and whether it can serve read-only by itself."""

    path: Path
    is_rust: bool
    has_readonly: bool = True

    def check(self, shares: Sequence[SharedDir]) -> None:
        """Raise MissingRequirementError for the first shared dir that it cannot serve this user as asked for."""
        for share in shares:
            self.command(share, Path("socket"))

    def command(self, share: SharedDir, socket_path: Path) -> list[str]:
        """Return the arguments that serve one directory, in the strictest sandbox this user can have."""
        sandbox = "chroot" if os.geteuid() == 0 else "namespace"
        host_path = os.fspath(share.host_path)
        by_mount = share.read_only and not (self.is_rust and self.has_readonly)
        place = f"{socket_path}.mount"
        mount = _mounted(share, place, read_only=by_mount) if by_mount or share.hidden else []
        source = f"{place}/tree" if mount else host_path
        if self.is_rust:
            flags = ["--readonly"] if share.read_only and not by_mount else []
            flags += [f"--modcaps={NO_DEVICE_NODES}"] if os.geteuid() == 0 else []
            if not share.announce_submounts:
                flags.append("--no-announce-submounts")
            return [
                *mount,
                os.fspath(self.path),
                f"--socket-path={socket_path}",
                f"--shared-dir={source}",
                f"--cache={share.cache}",
                f"--sandbox={sandbox}",
                # The handles that newer ones use by default find a file on FUSE while the kernel has it cached, and are stale
                # after that: nothing in a lab's --rw directory could be opened.
                "--inode-file-handles=never",
                *flags,
            ]
        if os.geteuid() != 0:
            raise MissingRequirementError(
                f"shared dir {share.tag!r}: {str(self.path)!r} is the C virtiofsd of QEMU 7 and older, which works for root only: "
                "install the Rust one ('cargo install virtiofsd'; packaged from Debian 13 and Ubuntu 24.04 on), or run as root"
            )
        # Its option parser is libfuse's: a backslash takes the special meaning from a comma, and from itself.
        source = source.replace("\\", "\\\\").replace(",", "\\,")
        cache = "none" if share.cache == "never" else share.cache
        options = f"source={source},cache={cache},sandbox={sandbox},modcaps={NO_DEVICE_NODES}"
        return [*mount, os.fspath(self.path), f"--socket-path={socket_path}", "-o", options]


def _mounted(share: SharedDir, place: str, *, read_only: bool) -> list[str]:
    """Return what runs a command with a shared dir at `place`/tree, without what is hidden in it, and read-only where asked for."""
    # A virtiofsd that cannot serve read-only is given a mount that is. Its submounts are not read-only by themselves.
    reason = _why_no_mount_namespace(os.geteuid(), os.environ.get("PATH"))
    if reason is not None and read_only:
        since = ".".join(map(str, Feature.READ_ONLY_SHARES.value.since))
        raise MissingRequirementError(
            f"shared dir {str(share.host_path)!r} cannot be read-only with this virtiofsd, which has no --readonly (the Rust one "
            f"has it since {since}), nor by a mount of ours: {reason}. Install a newer one ('cargo install virtiofsd'), or run as "
            "root"
        )
    if reason is not None:
        raise MissingRequirementError(
            f"nothing of {str(share.host_path)!r} can be hidden from the guest, since there can be no mount namespace: {reason}. "
            "Allow user namespaces, run as root (in a container: with CAP_SYS_ADMIN), or hide nothing: root=HostRoot(hidden=[])"
        )
    lines = ""
    for path in hidden_paths(share):
        empty = "empty" if (share.host_path / path).is_dir() else "nothing"
        lines += f"{_fstab(f'{place}/{empty}')} {_fstab(f'{place}/tree/{path}')} none bind 0 0\n"
    mode = "ro" if read_only else "rw"
    return [*_mount_namespace(os.geteuid()), "sh", "-c", MOUNT_SCRIPT, os.fspath(share.host_path), place, mode, lines]


def hidden_paths(share: SharedDir) -> list[Path]:
    """Return what there is of a shared dir's hidden paths, relative to it; what is within another one is left out."""
    base = Path(os.path.realpath(share.host_path))
    found = set()
    for pattern in share.hidden:
        path = Path(os.path.expanduser(pattern))
        for each in Path("/").glob(str(path.relative_to("/"))) if glob.has_magic(str(path)) else [path]:
            # Of a link, what it leads to: the guest can go there by itself.
            real = Path(os.path.realpath(each))
            if real.exists() and base in real.parents:
                found.add(real.relative_to(base))
    return [path for path in sorted(found) if found.isdisjoint(path.parents)]


def _fstab(path: str) -> str:
    # fstab(5)
    return "".join(f"\\{ord(char):03o}" if char in " \t\n\\#" else char for char in path)


def _mount_namespace(user: int) -> list[str]:
    user_namespace = ["--user", "--map-root-user"] if user != 0 else []
    return ["unshare", *user_namespace, "--mount", "--propagation", "private"]


@lru_cache(maxsize=4)
def _why_no_mount_namespace(user: int, _path: str | None) -> str | None:
    """Return why a user cannot have a mount namespace, which distributions and containers may deny; None where they can."""
    try:
        command = [*_mount_namespace(user), "true"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unshare(1) cannot be run ({error})"
    return done.stderr.strip()[:200] or f"unshare(1) ended with status {done.returncode}" if done.returncode else None


def find_virtiofsd(override: Path | None = None) -> Virtiofsd:
    """Return this host's virtiofsd; raises InvalidConfigError with the package to install where there is none, or the rights."""
    _check_rights()
    binary = find_binary("virtiofsd", PLACES, INSTALL, override)
    return Virtiofsd(
        binary.path, is_rust=program_of(binary) != "virtiofsd (C)", has_readonly=not lacks(binary, Feature.READ_ONLY_SHARES)
    )


def _check_rights() -> None:
    """Raise MissingRequirementError where this user is a root of too few rights for virtiofsd."""
    lacks = missing(NEEDED_AS_ROOT) if os.geteuid() == 0 else []
    if lacks:
        raise MissingRequirementError(
            f"there can be no shared dirs: virtiofsd, as root, needs {', '.join(lacks)}, which this process has not; give "
            "them to the container (Docker: --cap-add), or run as another user than root where user namespaces are allowed"
        )


def check_shared_dir(share: SharedDir) -> None:
    """Raise InvalidConfigError where the directory is missing, none, or has no valid text for a name."""
    path = share.host_path
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise InvalidConfigError(
            f"shared dir {share.tag!r}: the path {os.fsencode(path)!r} is not valid UTF-8, which virtiofsd cannot take; rename it"
        ) from error
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise InvalidConfigError(f"shared dir {share.tag!r}: {str(path)!r} {what}")


@dataclass(frozen=True, slots=True)
class StartedShare:
    """A virtiofsd that was started, and may not listen at its socket yet."""

    served: ServedShare
    keeper: Keeper
    deadline: Deadline

    def wait(self) -> ServedShare:
        """Wait until it listens; raises BootFailedError naming tag and path, and the process is then already gone."""
        socket_path = self.served.socket
        with FileWatch(socket_path.parent) as watch:
            ended = False
            while not socket_path.exists() or not _listens(socket_path):
                if ended or self.deadline.expired:
                    raise BootFailedError(_why(self.served, self.keeper, ended, self.deadline.total_s))
                # From its file's coming to its listening is a moment, whose end nothing tells of.
                ended = watch.wait(Deadline.after(LISTEN_S) if socket_path.exists() else self.deadline, self.served.process.pid)
        return self.served


def start_share(program: Virtiofsd, share: SharedDir, socket_path: Path, host: Host, lease: Lease | None = None) -> StartedShare:
    """Start a virtiofsd, which has 5 s from now on to listen at its socket, 25 s where it hides something.

    What it will leave behind goes with the lease; None: an earlier one at the same socket has seen to that.
    """
    if lease is not None:
        _lease_lock_file(program, socket_path, lease)
    socket_path.unlink(missing_ok=True)
    # The Rust one locks it beside the socket; one that still serves an earlier connection holds it.
    Path(f"{socket_path}.pid").unlink(missing_ok=True)
    keeper = host.keeper()
    process = keeper.spawn(program.command(share, socket_path), socket_path.with_suffix(".log"), socket_path.parent)
    host.started.add("share")
    deadline = Deadline.after(SOCKET_TIMEOUT_S + (HIDING_TIMEOUT_S if share.hidden else 0))
    return StartedShare(ServedShare(share, process, socket_path), keeper, deadline)


def serve_share(program: Virtiofsd, share: SharedDir, socket_path: Path, host: Host, lease: Lease | None = None) -> ServedShare:
    """Start a virtiofsd and wait until it listens at its socket, for at most 25 s; see `start_share`, `StartedShare.wait`."""
    return start_share(program, share, socket_path, host, lease).wait()


def _listens(socket_path: Path) -> bool:
    """Tell whether somebody listens at a socket that is there; to connect would take a virtiofsd's only connection.

    Of the kernel's table (net/unix/af_unix.c, unix_seq_show): flags in the fourth column, 0x10000 for a listener, and the path.
    What an earlier listener there has accepted is in it too.
    """
    with open("/proc/net/unix", "rb") as table:
        rows = [line.rstrip(b"\n").split(maxsplit=7) for line in table]
    flags = [int(row[3], 16) for row in rows if len(row) == 8 and row[7] == os.fsencode(socket_path)]
    # Where it is in another network namespace's, nothing is known of it.
    return not flags or any(flag & 0x10000 for flag in flags)


def _lease_lock_file(program: Virtiofsd, socket_path: Path, lease: Lease) -> None:
    """Have the lock file that a virtiofsd will leave behind removed with the VM."""
    # As another user it has no place to write to, and says so itself.
    if program.is_rust or not os.access(STATE_DIR.parent, os.W_OK):
        return
    lock = STATE_DIR / f"{os.fspath(socket_path).replace('/', '.')}.pid"
    lease.add_lock(lock)
    while True:
        STATE_DIR.mkdir(mode=0o700, exist_ok=True)
        try:
            # Made before it is needed: as long as it is there, nobody who leaves removes the directory.
            lock.touch(mode=0o600)
            return
        except FileNotFoundError:
            continue


def _why(served: ServedShare, keeper: Keeper, ended: bool, total_s: float) -> str:
    process, log, share = served.process, served.log, served.share
    if ended:
        what = f"ended with status {keeper.returncode(process)}"
    else:
        what = f"did not listen at its socket within {total_s:g} s"
        os.kill(process.pid, 9)
    try:
        said = log.read_text(errors="replace")[-2000:]
    except OSError as error:
        raise HostError(f"the log {log} of virtiofsd cannot be read: {error}") from error
    return f"virtiofsd for shared dir {share.tag!r} ({share.host_path}) {what}; its log {log} ends with:\n{said or '(nothing)'}"

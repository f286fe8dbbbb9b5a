"""Debian, by mmdebstrap: systemd, a kernel for VMs, cloud-init and an SSH server, as a stock cloud image has them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pytest_chvm.base.cache import built_once
from pytest_chvm.base.progress import Progress
from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.guest.builders.disk import Layout, make_disk
from pytest_chvm.guest.builders.tools import check_tools, run_tool
from pytest_chvm.model import architecture

PACKAGES = (
    f"linux-image-cloud-{architecture(None).debian}", "initramfs-tools", "systemd-boot-efi", "systemd-sysv", "udev", "dbus",
    "iproute2", "openssh-server", "cloud-init", "sudo",
)  # fmt: skip
# Debian policy, 5.6.1.
PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
SUITE = re.compile(r"[a-z][a-z0-9-]*")
CMDLINE = f"rw {architecture(None).console_word}"
# What mmdebstrap takes over of the host goes. The locale is one that needs no package and that cloud-init need not make. There
# is no fstab: the root is mounted to be written, and nothing waits for its device.
TIDY = """
rm -f "$1/etc/resolv.conf"
echo debian >"$1/etc/hostname"
echo LANG=C.UTF-8 >"$1/etc/default/locale"
printf '127.0.0.1 localhost\\n127.0.1.1 debian\\n::1 localhost ip6-localhost ip6-loopback\\n' >"$1/etc/hosts"
"""


@dataclass(frozen=True, slots=True)
class DebianRecipe:
    """What an image is made of.

    `packages`: what is installed beside `PACKAGES`, of which `without` are left out. `size_mb`: of the disk, in MiB. `mirror`:
    where packages come from; None: from where the host has them, else from deb.debian.org. Raises InvalidConfigError for what
    cannot be.
    """

    suite: str = "bookworm"
    packages: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    size_mb: int = 2048
    mirror: str | None = None

    def __post_init__(self) -> None:
        if not SUITE.fullmatch(self.suite):
            raise InvalidConfigError(f"suite {self.suite!r} is none of Debian's: expected bookworm, trixie, ...")
        for package in (*self.packages, *self.without):
            if not PACKAGE.fullmatch(package):
                raise InvalidConfigError(f"{package!r} is no package's name: expected names like nginx,python3")
        if unknown := [package for package in self.without if package not in PACKAGES]:
            raise InvalidConfigError(f"{', '.join(unknown)} cannot be left out: expected some of {', '.join(PACKAGES)}")

    @property
    def installed(self) -> tuple[str, ...]:
        """All packages that are asked for."""
        return (*(package for package in PACKAGES if package not in self.without), *self.packages)


def build_debian(recipe: DebianRecipe, cache: Path, progress: Progress, *, anew: bool = False) -> Path:
    """Return a qcow2 image of Debian, built at the first call, and again with `anew`; takes a minute or two.

    Raises MissingRequirementError where a program is missing, HostError where one fails, InvalidConfigError where the disk is too
    small.
    """
    sources = [recipe.mirror] if recipe.mirror else _sources_of_host(recipe.suite)
    key = hashlib.sha256(json.dumps([TIDY, CMDLINE, PACKAGES, asdict(recipe)]).encode()).hexdigest()
    root_uuid = str(uuid.uuid5(uuid.NAMESPACE_OID, key))

    def build(directory: Path) -> None:
        check_tools()
        progress(f"building an image of Debian {recipe.suite} with {', '.join(recipe.installed)}: this takes some minutes")
        archive = directory / "root.tar"
        words = ["mmdebstrap", "--variant=minbase", "--format=tar", f"--include={','.join(recipe.installed)}"]
        words += [f"--customize-hook={TIDY}", recipe.suite, str(archive), *sources]
        run_tool(words, heard=lambda line: _tell(line, progress))
        progress("making its disk")
        layout = Layout(recipe.size_mb, root_uuid, f"Debian {recipe.suite}", CMDLINE)
        make_disk(archive, layout, directory, directory / "image.qcow2")

    target = cache / "built" / f"debian-{recipe.suite}-{key[:24]}"
    before = _identity(target) if anew else None
    return built_once(target, build, lambda path: path.is_dir() and _identity(path) != before, progress=progress) / "image.qcow2"


def _identity(directory: Path) -> int | None:
    return directory.stat().st_ino if directory.exists() else None


def _tell(line: str, progress: Progress) -> None:
    if line.startswith("I: ") and not line.startswith("I: success"):
        progress(f"mmdebstrap: {line[3:]}")


def _sources_of_host(suite: str) -> Sequence[str]:
    """Return the lines of sources.list by which the host has packages of a suite; none where it does not know it."""
    if shutil.which("apt-get") is None:
        return []
    words = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(CODENAME) deb $(REPO_URI) $(RELEASE) $(COMPONENT)"]
    done = subprocess.run([*words, "Created-By: Packages"], capture_output=True, text=True, timeout=60, check=False)
    found = re.findall(rf"^Debian {re.escape(suite)}(?:-updates|-security)? (deb \S+ \S+ main)$", done.stdout, re.M)
    # The rest is nothing without the suite itself.
    return list(dict.fromkeys(found)) if any(line.split()[2] == suite for line in found) else []

"""Packages of the machine's distribution, downloaded and unpacked into the cache without root, never installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pytest_chvm.base.cache import built_once
from pytest_chvm.base.progress import Progress
from pytest_chvm.base.trees import remove_tree
from pytest_chvm.base.untouched import wall_clock_s
from pytest_chvm.model import Architecture, architecture

DOWNLOAD_TIMEOUT_S = 300.0
LISTS_FRESH_FOR_S = 24 * 3600.0


class PackageError(Exception):
    """A package cannot be had on this machine; the message says why."""


def fetch_package(package: str, cache: Path, progress: Progress, arch: Architecture | None = None) -> Path:
    """Return the unpacked tree of one package of an architecture (None: this machine's).

    Raises PackageError where it cannot be had.
    """
    arch = arch or architecture(None)
    return fetch_packages([package], packages_dir(cache, arch) / package, cache, progress, arch)


def fetch_packages(
    packages: Sequence[str], place: Path, cache: Path, progress: Progress, arch: Architecture, *, expected: str = "*"
) -> Path:
    """Return a directory of the cache's in which packages of an architecture are unpacked, at the first call.

    Raises PackageError where one cannot be had, or where they have no file that matches `expected`.
    """

    def build(directory: Path) -> None:
        options = apt_options(arch, cache, progress)
        for package in packages:
            download_and_unpack(package, directory, progress, options)
        if not any(directory.glob(expected)):
            raise PackageError(f"no {expected} in {', '.join(packages)}")

    return built_once(place, build, progress=progress)


def packages_dir(cache: Path, arch: Architecture) -> Path:
    """Return where the packages of an architecture are unpacked."""
    return cache / ("packages" if arch.is_host else f"packages-{arch.debian}")


def apt_options(arch: Architecture, cache: Path, progress: Progress) -> list[str]:
    """Return the options by which apt knows the packages of an architecture: of another one than this machine's, lists of our own.

    They are fetched from where this machine's are, and from there again after a day. Raises PackageError where there are none.
    """
    if arch.is_host:
        return []

    def options(lists: Path) -> list[str]:
        settings = {
            "APT::Architecture": arch.debian,
            # One more of a list that is the machine's, unless it says nothing of it.
            "APT::Architectures::": arch.debian,
            "APT::Sandbox::User": "root",
            "Dir::State::Lists": lists,
            "Dir::State::status": "/dev/null",
            "Dir::Cache": lists,
            "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "",
            "Acquire::Languages": "none",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
        }
        return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]

    def build(lists: Path) -> None:
        if shutil.which("apt-get") is None:
            raise PackageError("there is no apt here")
        progress(f"fetching the package lists of {arch.debian}")
        try:
            done = subprocess.run(
                ["apt-get", "update", "-q", *options(lists)],
                capture_output=True,
                text=True,
                timeout=DOWNLOAD_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise PackageError(f"the package lists took longer than {DOWNLOAD_TIMEOUT_S:.0f} s") from error
        # One source that does not answer is no matter where another one does.
        if not any(lists.glob(f"*_binary-{arch.debian}_Packages*")):
            said = done.stderr.strip().splitlines()[-1:] or ["apt says nothing of it"]
            raise PackageError(f"the package sources of this machine have none for {arch.debian}: {said[0]}")

    return options(built_once(cache / "apt" / arch.debian, build, _is_fresh, progress=progress))


def _is_fresh(lists: Path) -> bool:
    # A stale list leads to downloads that are gone.
    return lists.is_dir() and wall_clock_s() - lists.stat().st_mtime < LISTS_FRESH_FOR_S


def apt_cache(*arguments: str) -> str:
    """Return what apt-cache says; raises PackageError where there is none."""
    if shutil.which("apt-cache") is None:
        raise PackageError("there is no apt here")
    done = subprocess.run(["apt-cache", *arguments], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout


def download_and_unpack(package: str, directory: Path, progress: Progress, options: Sequence[str] = ()) -> None:
    """Unpack a package into a directory; raises PackageError where it cannot be had. `options`: see `apt_options`."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise PackageError(f"there is no {tool} here")
    progress(f"fetching the package {package}")
    download = directory / "download"
    download.mkdir(exist_ok=True)
    try:
        subprocess.run(
            ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", *options, package],
            cwd=download,
            check=True,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
        )
        (archive,) = download.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, directory], check=True, capture_output=True, text=True, timeout=120)
    except subprocess.CalledProcessError as error:
        last = (error.stderr or error.stdout or "").strip().splitlines()[-1:] or ["no message"]
        raise PackageError(f"{Path(error.cmd[0]).name} failed with status {error.returncode}: {last[0]}") from error
    except subprocess.TimeoutExpired as error:
        raise PackageError(f"the download took longer than {DOWNLOAD_TIMEOUT_S:.0f} s") from error
    finally:
        remove_tree(download)

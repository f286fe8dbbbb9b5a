"""Packages of the machine's distribution, downloaded and unpacked into the cache without root, never installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from pytest_chvm.base.cache import built_once
from pytest_chvm.base.progress import Progress
from pytest_chvm.base.trees import remove_tree

DOWNLOAD_TIMEOUT_S = 300.0


class PackageError(Exception):
    """A package cannot be had on this machine; the message says why."""


def fetch_package(package: str, cache: Path, progress: Progress) -> Path:
    """Return the unpacked tree of one package; raises PackageError where it cannot be had."""
    return built_once(
        cache / "packages" / package, lambda directory: download_and_unpack(package, directory, progress), progress=progress
    )


def apt_cache(*arguments: str) -> str:
    """Return what apt-cache says; raises PackageError where there is none."""
    if shutil.which("apt-cache") is None:
        raise PackageError("there is no apt here")
    done = subprocess.run(["apt-cache", *arguments], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout


def download_and_unpack(package: str, directory: Path, progress: Progress) -> None:
    """Unpack a package into a directory; raises PackageError where it cannot be had."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise PackageError(f"there is no {tool} here")
    progress(f"fetching the package {package}")
    download = directory / "download"
    download.mkdir(exist_ok=True)
    try:
        subprocess.run(
            ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package],
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

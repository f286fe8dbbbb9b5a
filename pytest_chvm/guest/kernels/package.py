"""A kernel named by a package of the distribution: `debian:6.1`, `debian:6.12-cloud`, `debian:6.1.0-50-rt`.

The newest package that matches is taken, of those that this machine's package lists or the cache have; it is downloaded and
unpacked into the cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pytest_chvm.base.cache import built_once
from pytest_chvm.base.progress import Progress
from pytest_chvm.errors import InvalidConfigError, MissingRequirementError
from pytest_chvm.guest.images.boot_entries import version_key
from pytest_chvm.guest.packages import PackageError, apt_cache, apt_options, fetch_packages, packages_dir
from pytest_chvm.model import Architecture
from pytest_chvm.model.architecture import ARCHITECTURES

PREFIX = "debian:"
# linux-image-6.1.0-50-cloud-amd64, linux-image-6.12.111+deb12-amd64; not those with debug symbols, of templates, or unsigned.
ARCHITECTURE = "|".join(each.debian for each in ARCHITECTURES.values())
FLAVOUR = rf"(?:-((?!{ARCHITECTURE})[a-z][a-z0-9]*))?"
PACKAGE = re.compile(rf"linux-image-(\d+\.\d+\.\d[^-\s]*(?:-\d+)?){FLAVOUR}-({ARCHITECTURE})")
WANTED = re.compile(rf"debian:(\d+\.\d+[A-Za-z0-9.+~]*(?:-\d+)?){FLAVOUR}(?:-({ARCHITECTURE}))?")
APT_LISTS = Path("/var/lib/apt/lists")


@dataclass(frozen=True, slots=True)
class Package:
    """A package of a kernel; its release is as `uname -r` says it."""

    version: str
    flavour: str
    architecture: str

    @property
    def release(self) -> str:
        """The kernel's release, which a package's name ends with."""
        return "-".join(part for part in (self.version, self.flavour, self.architecture) if part)

    @property
    def name(self) -> str:
        """The package's name."""
        return f"linux-image-{self.release}"

    @property
    def word(self) -> str:
        """The shortest word that it is named by."""
        minor = ".".join(self.version.split(".")[:2])
        return f"{PREFIX}{minor}-{self.flavour}" if self.flavour else f"{PREFIX}{minor}"


def image_of_package(word: str, cache: Path, progress: Progress, arch: Architecture) -> Path:
    """Return the image of the kernel that a word names, fetched at the first call; its modules are beside it in `lib/modules`.

    Raises InvalidConfigError for a word that can name none, MissingRequirementError where it cannot be had here.
    """
    package = package_of(word, cache, progress, arch)
    # The built-in guest's may be the same.
    places = [place / package.name for place in _places(cache, arch)]
    place = next((each for each in places if each.is_dir()), places[0])
    try:
        expected = f"boot/vmlinu*-{package.release}"
        tree = fetch_packages([package.name], place, cache, progress, arch, expected=expected)
    except PackageError as error:
        raise MissingRequirementError(
            f"kernel {word!r}: the package {package.name} cannot be fetched: {error}; are the package lists old ('apt-get update')?"
        ) from error
    return next(iter(sorted(tree.glob(expected))))


def package_of(word: str, cache: Path, progress: Progress, arch: Architecture) -> Package:
    """Return the newest package that a word names; nothing is downloaded. Raises what `image_of_package` does."""
    wanted = WANTED.fullmatch(word)
    if wanted is None:
        raise InvalidConfigError(
            f"kernel {word!r}: expected debian:VERSION[-FLAVOUR], as in debian:6.1, debian:6.12-cloud, debian:6.1.0-50-rt"
        )
    if wanted[3] not in (None, arch.debian):
        raise InvalidConfigError(f"kernel {word!r} is for {wanted[3]}, and one for {arch.debian} is needed")
    known = [each for each in _known(cache, progress, arch) if each.architecture == arch.debian]
    found = [each for each in known if each.flavour == (wanted[2] or "") and _is_version(each.version, wanted[1])]
    if not found:
        words = sorted({each.word for each in known}, key=version_key)
        has = f"have {', '.join(words)}" if words else f"have no kernel for {arch.debian}: run 'apt-get update'"
        raise MissingRequirementError(f"kernel {word!r}: there is no such package; this machine's package lists {has}")
    return max(found, key=lambda each: version_key(each.version))


def _is_version(version: str, wanted: str) -> bool:
    """Tell whether 6.1.0-50 is a 6.1, which 6.12.1 is not."""
    return version == wanted or (version.startswith(wanted) and version[len(wanted)] in ".-+~")


def _known(cache: Path, progress: Progress, arch: Architecture) -> list[Package]:
    fetched = [path.name for place in _places(cache, arch) for path in place.glob("linux-image-*") if path.is_dir()]
    try:
        names = [*_listed(cache, progress, arch), *fetched]
    except PackageError as error:
        if not fetched:
            raise MissingRequirementError(f"a kernel of Debian's cannot be had: {error}; name a kernel's file") from error
        names = fetched
    return _packages(names)


def _packages(names: Iterable[str]) -> list[Package]:
    found = (PACKAGE.fullmatch(name) for name in dict.fromkeys(names))
    return [Package(match[1], match[2] or "", match[3]) for match in found if match is not None]


@lru_cache(maxsize=4)
def _listed(cache: Path, progress: Progress, arch: Architecture) -> Sequence[str]:
    """Return the packages of kernels that can be downloaded here. Asked of apt once for each state of its lists."""
    options = apt_options(arch, cache, progress)
    lists = next((Path(word.partition("=")[2]) for word in options if word.startswith("Dir::State::Lists=")), APT_LISTS)
    state = lists.stat().st_mtime_ns if lists.exists() else 0

    def build(directory: Path) -> None:
        names = [f"linux-image-{each.release}" for each in _packages(apt_cache(*options, "pkgnames", "linux-image-").split())]
        # What is only installed has no source in the lists.
        listed = apt_cache(*options, "madison", *names) if names else ""
        (directory / "names").write_text("".join(f"{line.split()[0]}\n" for line in listed.splitlines() if "|" in line))

    place = built_once(cache / "kernels" / "lists" / f"{arch.debian}-{state}", build, progress=progress)
    return (place / "names").read_text().split()


def _places(cache: Path, arch: Architecture) -> tuple[Path, Path]:
    # Not fetched to where the built-in guest's is: that is whichever is there.
    return cache / "kernels" / "packages", packages_dir(cache, arch)

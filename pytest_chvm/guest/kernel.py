"""Guest kernels: telling whether a file is one, finding its modules, fetching one from a distribution.

Everything works without root: a package is downloaded and unpacked into the cache, never installed.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pytest_chvm.base.cache import built_once, locked
from pytest_chvm.base.progress import Progress
from pytest_chvm.base.trees import remove_tree
from pytest_chvm.errors import HostError, InvalidConfigError, MissingRequirementError, VmError
from pytest_chvm.guest.kernel_image import check_kernel_image

# Packages whose kernel is made for VMs, first choice first; the first that the machine's package lists know is taken.
KERNEL_PACKAGES = {
    "x86_64": ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64"),
}
DOWNLOAD_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel image, its release as `uname -r` says it, and its modules (None: none found)."""

    image: Path
    release: str | None
    modules: Path | None


def inspect_kernel(image: Path) -> Kernel:
    """Return a kernel image's release and modules; raises InvalidConfigError where the file is no kernel image.

    Whether a VMM can boot it is for `kernel_image.check_kernel_image` to say.
    """
    try:
        with image.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise InvalidConfigError(f"kernel {str(image)!r} cannot be read: {error.strerror}") from error
    release = None
    if head[0x202:0x206] == b"HdrS":
        release = _bzimage_release(image, head)
    elif head[:4] == b"\x7fELF":
        release = _banner_release(image)
    else:
        check_kernel_image(image)
    return Kernel(image, release, find_modules(image, release))


def _bzimage_release(image: Path, head: bytes) -> str | None:
    # boot.rst, kernel_version: offset, less 0x200, of a NUL-terminated string whose first word is the release.
    offset = int.from_bytes(head[0x20E:0x210], "little")
    if offset == 0:
        return None
    with image.open("rb") as file:
        file.seek(offset + 0x200)
        text = file.read(256)
    words = text.split(b"\0")[0].split()
    return words[0].decode(errors="replace") if words else None


def _banner_release(image: Path) -> str | None:
    with image.open("rb") as file:
        overlap = b""
        while chunk := file.read(1 << 20):
            if match := re.search(rb"Linux version (\d[^\s\0]{0,127}) ", overlap + chunk):
                return match[1].decode(errors="replace")
            overlap = chunk[-256:]
    return None


def find_modules(image: Path, release: str | None) -> Path | None:
    """Return the module tree that belongs to a kernel image, or None where there is none.

    Looked for beside the image and beside the target of a link, as in an unpacked package (`boot/` next to `lib/modules/`), then
    below the image's directory, then among the host's own.
    """
    if release is None or "/" in release:
        return None
    places = dict.fromkeys((image.parent, image.resolve().parent))
    roots = [root for place in places for root in (place.parent, place.parent / "usr", place)]
    roots += [Path("/"), Path("/usr")]
    for root in roots:
        tree = root / "lib" / "modules" / release
        if (tree / "kernel").is_dir():
            return tree
    return None


def modules_of(root: Path, release: str | None) -> Path | None:
    """Return the module tree of a release below a root, and nowhere else."""
    tree = root / "lib" / "modules" / (release or "")
    return tree if release and "/" not in release and (tree / "kernel").is_dir() else None


def index_modules(tree: Path, busybox: Path) -> None:
    """Write the index that modprobe reads into a module tree that has none; raises HostError where it cannot be."""
    if (tree / "modules.dep").exists():
        return
    try:
        with locked(tree):
            if not (tree / "modules.dep").exists():
                base = tree.parents[2]
                subprocess.run([busybox, "depmod", "-b", base, tree.name], check=True, capture_output=True, timeout=120)
    except VmError:
        raise
    except (OSError, subprocess.SubprocessError) as error:
        raise HostError(f"the modules in {str(tree)!r} have no index, and none can be written: {error}") from error


@dataclass(frozen=True, slots=True)
class Module:
    """One kernel module: `data` is the plain ELF file, decompressed where the tree has it compressed."""

    name: str
    path: Path
    data: bytes


def modules_in_order(tree: Path, wanted: Iterable[str]) -> list[Module]:
    """Return the wanted modules and all they depend on, each after what it depends on.

    Read from the modules themselves (`depends=` and `softdep=pre:` in their `.modinfo`, see modinfo(8)),
    so that no depmod is needed. Modules that the tree does not have are left out: they are built in or do not exist.
    """
    paths: dict[str, Path] = {}
    for path in sorted(tree.glob("kernel/**/*.ko*")):
        paths.setdefault(_module_name(path), path)
    ordered: dict[str, Module] = {}

    def visit(name: str, ancestors: tuple[str, ...]) -> None:
        path = paths.get(name.replace("-", "_"))
        if path is None or name in ordered or name in ancestors:
            return
        data = _decompressed(path)
        for needed in _dependencies(data):
            visit(needed, (*ancestors, name))
        ordered[name] = Module(name, path, data)

    for name in wanted:
        visit(name.replace("-", "_"), ())
    return list(ordered.values())


def _module_name(path: Path) -> str:
    return path.name.split(".ko")[0].replace("-", "_")


def _dependencies(data: bytes) -> Iterator[str]:
    for match in re.finditer(rb"\0(?:depends=([^\0]*)|softdep=pre:([^\0]*))(?=\0)", data):
        for word in re.split(rb"[,\s]+", match[1] or match[2] or b""):
            name = word.decode(errors="replace").replace("-", "_")
            if name.startswith("post:"):
                break
            if name and ":" not in name:
                yield name


def _decompressed(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return zlib.decompress(data, wbits=31)
    if path.suffix == ".zst":
        import zstandard

        return bytes(zstandard.ZstdDecompressor().stream_reader(data).read())
    return data


def default_kernel(cache: Path, machine: str, progress: Progress) -> Kernel:
    """Return the kernel of the built-in guest: one from a package, else the host's own where readable.

    Raises InvalidConfigError that says what to do where there is neither.
    """
    refused = []
    cached = sorted((cache / "packages").glob("linux-*/boot/vmlinu*"))
    if cached:
        return inspect_kernel(cached[0])
    for package in KERNEL_PACKAGES.get(machine, ()):
        try:
            tree = fetch_kernel_package(package, cache, progress)
        except PackageError as error:
            refused.append(f"{package}: {error}")
            continue
        for image in sorted((tree / "boot").glob("vmlinu*")):
            return inspect_kernel(image)
    release = os.uname().release
    for own in (Path(f"/boot/vmlinuz-{release}"), Path(f"/lib/modules/{release}/vmlinuz")):
        if os.access(own, os.R_OK):
            return inspect_kernel(own)
        refused.append(f"{own}: {'not readable by you' if own.exists() else 'not there'}")
    raise MissingRequirementError(
        "no kernel for the built-in guest: " + "; ".join(refused) + ". Name one with --chvm-kernel=PATH, or on Debian "
        "and Ubuntu run 'apt-get update' so that one can be fetched"
    )


class PackageError(Exception):
    """A package cannot be had on this machine; the message says why."""


def fetch_kernel_package(package: str, cache: Path, progress: Progress) -> Path:
    """Return the unpacked tree of the kernel a metapackage stands for, downloaded at the first call.

    Raises PackageError where the distribution has no such package or it cannot be downloaded.
    """
    needed = _real_kernel_packages(package)

    def build(directory: Path) -> None:
        for name in needed:
            _download_and_unpack(name, directory, progress)
        if not list((directory / "boot").glob("vmlinu*")):
            raise PackageError(f"no kernel image in {', '.join(needed)}")

    return built_once(cache / "packages" / needed[0], build, progress=progress)


def _real_kernel_packages(package: str) -> list[str]:
    """Return the image package behind a metapackage, and on Ubuntu the one that has its modules."""
    found: list[str] = []
    pending = [package]
    while pending and len(found) < 4:
        name = pending.pop(0)
        depends = re.findall(r"^\s*Depends: (linux-(?:image|modules)-\S+)$", _apt_cache("depends", name), re.M)
        if re.match(r"linux-(image|modules)-\d", name):
            found.append(name)
        pending += [d for d in depends if d not in found and d not in pending]
    if not found:
        raise PackageError("this machine's package lists do not know it")
    return found


def fetch_package(package: str, cache: Path, progress: Progress) -> Path:
    """Return the unpacked tree of one package; raises PackageError where it cannot be had."""
    return built_once(
        cache / "packages" / package, lambda directory: _download_and_unpack(package, directory, progress), progress=progress
    )


def _apt_cache(*arguments: str) -> str:
    if shutil.which("apt-cache") is None:
        raise PackageError("there is no apt here")
    done = subprocess.run(["apt-cache", *arguments], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout


def _download_and_unpack(package: str, directory: Path, progress: Progress) -> None:
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

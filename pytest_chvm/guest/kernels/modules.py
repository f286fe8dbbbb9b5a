"""The modules of a kernel: where they are, which depend on which, and their plain data.

Everything works without root.
"""

from __future__ import annotations

import lzma
import os
import re
import subprocess
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pytest_chvm.base.cache import locked
from pytest_chvm.errors import HostError, InvalidConfigError, VmError

# In a tree where a kernel was built, and in what was installed of it, a line for each module.
ORDER_FILE = "modules.order"


def find_modules(image: Path, release: str | None) -> Path | None:
    """Return the module tree that belongs to a kernel image, or None where there is none.

    Looked for in the tree that the image was built in, beside the image and beside the target of a link, as in an unpacked package
    (`boot/` next to `lib/modules/`), then below the image's directory, then among the host's own.
    """
    if release is None or "/" in release:
        return None
    if (built := _built_with(image, release)) is not None:
        return built
    places = dict.fromkeys((image.parent, image.resolve().parent))
    beside = next((place for place in places if place.name == release and (place / "kernel").is_dir()), None)
    roots = [*(root for place in places for root in (place.parent, place)), Path("/")]
    return beside or next((tree for root in roots if (tree := modules_of(root, release)) is not None), None)


def _built_with(image: Path, release: str) -> Path | None:
    """Return the tree in which an image was built, where it has that release's modules: `vmlinux`, `arch/x86/boot/bzImage`."""
    parents = image.resolve().parents
    for tree in (parents[0], *parents[3:4]):
        if is_build_tree(tree) and built_release(tree) == release:
            return tree
    return None


def built_release(tree: Path) -> str | None:
    """Return the release of what was built in a tree last, as its build has written it down."""
    try:
        return (tree / "include/config/kernel.release").read_text(errors="replace").strip() or None
    except OSError:
        return None


def modules_of(root: Path, release: str | None) -> Path | None:
    """Return the module tree of a release below a root, and nowhere else."""
    if not release or "/" in release:
        return None
    trees = (root / place / release for place in ("lib/modules", "usr/lib/modules"))
    return next((tree for tree in trees if (tree / "kernel").is_dir()), None)


def module_files(modules_dir: Path) -> dict[str, Path]:
    """Return the files of a kernel's modules by their names, with underscores; they may be compressed (`.ko.xz`).

    `modules_dir`: see `pytest_chvm.guest.kernels.kernel.Kernel`. Of several of one name the first counts.
    """
    files: dict[str, Path] = {}
    if is_build_tree(modules_dir):
        # "kernel/fs/ext4/ext4.ko" before Linux 5.3, "fs/ext4/ext4.ko", "fs/ext4/ext4.o" since 6.3.
        lines = (modules_dir / ORDER_FILE).read_text(errors="replace").split()
        built = (modules_dir / line.removeprefix("kernel/") for line in lines)
        paths = [path for each in built if (path := each.with_suffix(".ko")).is_file()]
    else:
        # Those that were installed beside the kernel's own come first, as with depmod (depmod.d(5)).
        paths = [path for place in ("updates", "extra", "kernel") for path in sorted(modules_dir.glob(f"{place}/**/*.ko*"))]
    for path in paths:
        files.setdefault(_module_name(path), path)
    return files


def is_build_tree(directory: Path) -> bool:
    """Tell whether a kernel was built in a directory, its modules too."""
    return (directory / ORDER_FILE).is_file() and (directory / "include" / "config").is_dir()


def check_release(modules_dir: Path, release: str) -> None:
    """Raise InvalidConfigError where a kernel's modules are not of its release, by the `vermagic` of one (modinfo(8))."""
    for file in _some_module(modules_dir):
        found = re.search(rb"\0vermagic=(\S+)", decompressed(file))
        if found is not None and (of := found[1].decode(errors="replace")) != release:
            raise InvalidConfigError(
                f"the modules in {str(modules_dir)!r} are of another release than their kernel: {file.name} is for {of}, and "
                f"the kernel is {release}, which would load none of them; build and install both anew"
            )


def _some_module(modules_dir: Path) -> Iterator[Path]:
    """Yield one file of a module, always the same, without looking at all of them."""
    if is_build_tree(modules_dir):
        yield from list(module_files(modules_dir).values())[:1]
        return
    for directory, below, files in os.walk(modules_dir / "kernel"):
        below.sort()
        if modules := sorted(name for name in files if ".ko" in name):
            yield Path(directory, modules[0])
            return


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
    paths = module_files(tree)
    ordered: dict[str, Module] = {}

    def visit(name: str, ancestors: tuple[str, ...]) -> None:
        path = paths.get(name.replace("-", "_"))
        if path is None or name in ordered or name in ancestors:
            return
        data = decompressed(path)
        for needed in (*dependencies(data), *_wanted_before(data)):
            visit(needed, (*ancestors, name))
        ordered[name] = Module(name, path, data)

    for name in wanted:
        visit(name.replace("-", "_"), ())
    return list(ordered.values())


def _module_name(path: Path) -> str:
    return path.name.split(".ko")[0].replace("-", "_")


def dependencies(data: bytes) -> Iterator[str]:
    """Yield the names of the modules that one, as the plain ELF file, needs before it."""
    for match in re.finditer(rb"\0depends=([^\0]*)(?=\0)", data):
        yield from filter(None, (word.replace("-", "_") for word in match[1].decode(errors="replace").split(",")))


def _wanted_before(data: bytes) -> Iterator[str]:
    """Yield the names of those that are to come before it where they can be had (softdep, modprobe.d(5))."""
    for match in re.finditer(rb"\0softdep=pre:([^\0]*)(?=\0)", data):
        for word in re.split(rb"[,\s]+", match[1]):
            name = word.decode(errors="replace").replace("-", "_")
            if name.startswith("post:"):
                break
            if name and ":" not in name:
                yield name


def decompressed(path: Path) -> bytes:
    """Return the plain ELF file of a module; raises InvalidConfigError where it cannot be read."""
    try:
        return _decompress(path.suffix, path.read_bytes())
    except (OSError, lzma.LZMAError, zlib.error, ValueError) as error:
        raise InvalidConfigError(f"the module {str(path)!r} cannot be read: {error}") from error


def _decompress(suffix: str, data: bytes) -> bytes:
    if suffix == ".xz":
        return lzma.decompress(data)
    if suffix == ".gz":
        return zlib.decompress(data, wbits=31)
    if suffix == ".zst":
        import zstandard

        try:
            return bytes(zstandard.ZstdDecompressor().stream_reader(data).read())
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error
    return data

"""The built-in guest: an initramfs of BusyBox, the modules a VM needs and `init.sh`, put together here.

It is cached by the content of all that goes into it.
"""

from __future__ import annotations

import hashlib
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pytest_chvm.base.cache import built_once
from pytest_chvm.base.progress import Progress
from pytest_chvm.errors import MissingRequirementError
from pytest_chvm.guest import carry, elf, renew, signals, stream
from pytest_chvm.guest.kernels.kernel import Kernel
from pytest_chvm.guest.kernels.modules import Module, modules_in_order
from pytest_chvm.guest.packages import PackageError, fetch_package
from pytest_chvm.model import Architecture, architecture

# Each for a device or file system the built-in guest is promised with; what they depend on is read from the tree.
WANTED_MODULES = (
    "virtio_pci",
    "virtio_mmio",
    "virtio_console",
    "virtio_net",
    "virtio_blk",
    "virtiofs",
    "virtio_rng",
    # ext4 asks for it by an alias, which only modprobe understands.
    "crc32c_generic",
    "ext4",
    "af_packet",
    "pvpanic_pci",
    "vmw_vsock_virtio_transport",
    # Says where the kernel's description of itself is, for whoever reads a dump of its memory.
    "qemu_fw_cfg",
)
BUSYBOX_PLACES = (Path("/bin/busybox"), Path("/usr/bin/busybox"), Path("/usr/lib/busybox/busybox-static"))
DIRECTORIES = (
    "bin", "sbin", "usr", "usr/bin", "usr/sbin", "lib", "dev", "proc", "sys", "tmp", "run", "mnt", "root", "etc", "var", "var/tmp",
)  # fmt: skip


def build_initramfs(
    kernel: Kernel,
    cache: Path,
    progress: Progress,
    *,
    init_script: str = "init.sh",
    wanted: Sequence[str] = WANTED_MODULES,
    more: Sequence[Entry] = (),
) -> Path:
    """Return an initramfs for a kernel, the built-in guest's by default, built at the first call.

    `init_script` is its first process, a file of this package; `wanted` are the modules it has, with all they depend on;
    `more` is whatever else it has.
    Raises MissingRequirementError where BusyBox is not to be had or the cache cannot be written.
    """
    arch = kernel.architecture
    busybox = find_busybox(cache, progress, arch)
    modules = modules_in_order(kernel.modules_dir, wanted) if kernel.modules_dir else []
    files = resources.files("pytest_chvm.guest")
    init = files.joinpath(init_script).read_bytes()
    names = ("configure.sh", "fstab")
    tools = [
        Entry("lib/chvm", stat.S_IFDIR | 0o755),
        *(Entry(f"lib/chvm/{name}", stat.S_IFREG | 0o644, files.joinpath(name).read_bytes()) for name in names),
        *(_programs(arch) if arch.name in elf.WRITTEN_FOR else ()),
        *more,
    ]
    key = hashlib.sha256(b"recipe 3")
    called = "\0".join(entry.name for entry in tools).encode()
    for part in (busybox.read_bytes(), init, called, *(entry.data for entry in tools), *(module.data for module in modules)):
        key.update(hashlib.sha256(part).digest())

    def build(directory: Path) -> None:
        progress(f"building a guest ({init_script}) for kernel {kernel.release or kernel.image.name}")
        archive = write_cpio(_entries(busybox, arch, init, tools, modules))
        (directory / "initramfs.cpio").write_bytes(archive)

    return built_once(cache / "initramfs" / key.hexdigest()[:32], build, progress=progress) / "initramfs.cpio"


def add_words(initramfs: Path, words: Sequence[str], target: Path) -> Path:
    """Write the built-in guest's initramfs to `target`, with the words for which the command line has no room; returns `target`."""
    built_in = initramfs.read_bytes()
    told = Entry("lib/chvm/words", stat.S_IFREG | 0o644, "".join(f"{word}\n" for word in words).encode())
    # The kernel unpacks concatenated archives one after the other.
    target.write_bytes(built_in + bytes(-len(built_in) % 512) + write_cpio(iter([told])))
    return target


def _programs(arch: Architecture) -> list[Entry]:
    programs = {"/lib/chvm/renew": renew, "/lib/chvm/signals": signals, carry.PATH: carry, stream.PATH: stream}
    return [Entry(path[1:], stat.S_IFREG | 0o755, each.program(arch)) for path, each in programs.items()]


def find_busybox(cache: Path, progress: Progress, arch: Architecture | None = None) -> Path:
    """Return a statically linked BusyBox of an architecture (None: this machine's): the host's, else one from busybox-static.

    Of another architecture the host's is one on PATH that is called `busybox-ARCH`. Raises MissingRequirementError.
    """
    arch = arch or architecture(None)
    name = f"busybox-{arch.name}"
    on_path = shutil.which(name)
    places = BUSYBOX_PLACES if arch.is_host else ((Path(on_path),) if on_path else ())
    for place in places:
        if is_static_executable(place):
            return place
    try:
        tree = fetch_package("busybox-static", cache, progress, arch)
    except PackageError as error:
        looked, instead = ", ".join(map(str, BUSYBOX_PLACES)), "install busybox-static (Debian, Ubuntu) or busybox (Fedora, Arch)"
        if not arch.is_host:
            looked, instead = f"{name} on PATH", "put one there, or name an initramfs"
        raise MissingRequirementError(
            f"no statically linked BusyBox of {arch.name} for the built-in guest: none at {looked}, and the package "
            f"cannot be fetched ({error}); {instead}"
        ) from error
    for place in sorted(tree.glob("**/busybox")):
        if is_static_executable(place):
            return place
    raise MissingRequirementError(f"the package busybox-static has no static busybox: looked in {str(tree)!r}")


def is_static_executable(path: Path) -> bool:
    """Tell whether a file is an ELF executable that names no dynamic linker in its first page."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    return head[:4] == b"\x7fELF" and b"/ld-" not in head


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the archive: `mode` with the file type, `device` as (major, minor), `mtime` in seconds."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)
    mtime: int = 0


def _entries(busybox: Path, arch: Architecture, init: bytes, tools: list[Entry], modules: list[Module]) -> Iterator[Entry]:
    for directory in DIRECTORIES:
        yield Entry(directory, stat.S_IFDIR | (0o1777 if directory.endswith("tmp") else 0o755))
    # The kernel opens it before the first process can mount anything.
    yield Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    yield Entry("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes())
    for name in _applets(busybox) if arch.is_host else ["bin/sh"]:
        yield Entry(name, stat.S_IFLNK | 0o777, b"/bin/busybox")
    yield Entry("etc/passwd", stat.S_IFREG | 0o644, b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")
    yield Entry("etc/group", stat.S_IFREG | 0o644, b"root:x:0:\nnogroup:x:65534:\n")
    yield Entry("etc/hosts", stat.S_IFREG | 0o644, b"127.0.0.1 localhost\n")
    yield from tools
    yield Entry("lib/modules", stat.S_IFDIR | 0o755)
    for module in modules:
        yield Entry(f"lib/modules/{module.name}.ko", stat.S_IFREG | 0o644, module.data)
    names = "".join(f"/lib/modules/{module.name}.ko\n" for module in modules)
    yield Entry("lib/chvm-modules", stat.S_IFREG | 0o644, names.encode())
    yield Entry("init", stat.S_IFREG | 0o755, init)


def _applets(busybox: Path) -> list[str]:
    listed = subprocess.run([busybox, "--list-full"], capture_output=True, text=True, check=True, timeout=10)
    return [applet if "/" in applet else f"bin/{applet}" for applet in listed.stdout.split() if applet != "bin/busybox"]


def write_cpio(entries: Iterator[Entry]) -> bytes:
    """Return entries as a "newc" archive (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    archive = bytearray()
    trailer = Entry("TRAILER!!!", 0)
    for inode, entry in enumerate((*entries, trailer), start=1):
        name = entry.name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        header = (inode, entry.mode, 0, 0, links, entry.mtime, len(entry.data), 0, 0, *entry.device, len(name), 0)
        archive += b"070701" + b"".join(b"%08X" % value for value in header) + name
        archive += bytes(-len(archive) % 4) + entry.data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)

"""What system is on an image, found out in a VM of ours that has it as its only disk; the host itself never reads what is on it.

What comes from there is the image's, and not trusted: lines are matched whole, sizes bounded, archives unpacked with a filter.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path, PurePosixPath

from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.guest.images.boot_entries import BootEntry, chosen_entry, newest
from pytest_chvm.guest.images.superblocks import HEAD_BYTES, FileSystem, identify, what_else
from pytest_chvm.guest.kernel import inspect_kernel
from pytest_chvm.guest.kinds import Run

# What the VM that looks at images needs beside what every guest does.
FILE_SYSTEM_MODULES = ("ext4", "xfs", "btrfs", "vfat", "nls_cp437", "nls_iso8859_1", "nls_ascii", "nls_utf8")
# For devices and file systems of a guest, and what these ask the kernel for by other names than their own.
MODULES = (
    "virtio_pci", "virtio_blk", "virtio_console", "virtio_net", "virtio_rng", "virtiofs", "pvpanic_pci", "af_packet",
    "vmw_vsock_virtio_transport", "crc32c_generic", "crc32c_intel", "libcrc32c",
)  # fmt: skip
MODULES_OF = {"btrfs": ("btrfs", "xxhash_generic", "blake2b_generic", "sha256_generic"), "xfs": ("xfs",), "ext4": ("ext4",)}
# Of a boot loader's words those that say where it would print, and what our initramfs does in the place of the image's.
NOT_TAKEN = re.compile(r"(console|earlycon|earlyprintk|initrd|BOOT_IMAGE|rootwait|rootflags|rd)([.=].*)?|ro|rw|splash|rhgb")
SAID = re.compile(r"(mounted|refused|root|kernel|config) (vda\d{0,3}) ([ -~]{0,1000})")
LARGEST_TEXT, LARGEST_KERNEL, HANDED_OUT_BYTES = 1 << 20, 256 << 20, 512 << 20
MOST_PARTITIONS = 128
SYSTEM_FILE, KERNEL_FILE = "system.json", "kernel"


class NoSystemError(Exception):
    """There is no system on an image that boots here; the message says what there is."""


@dataclass(frozen=True, slots=True)
class System:
    """The system on an image: where its root is on the disk, and what its kernel is told.

    `device`: the partition's name in a guest, or the disk's. `options`: what its root is mounted with.
    """

    device: str
    type: str
    options: str
    cmdline: str

    def write(self, directory: Path) -> None:
        """Keep it in a directory, beside its kernel and modules."""
        (directory / SYSTEM_FILE).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, directory: Path) -> System:
        """Return what `write` kept."""
        return cls(**json.loads((directory / SYSTEM_FILE).read_text()))


@dataclass(frozen=True, slots=True)
class _Found:
    """What a VM has seen on a disk: by device its file systems; roots, kernels and configurations as (device, path)."""

    systems: Mapping[str, FileSystem]
    roots: Sequence[tuple[str, str]]
    kernels: Sequence[tuple[str, str]]
    configs: Sequence[tuple[str, str]]


def take_system(run: Run, handed_out: Path, directory: Path) -> System:
    """Write the kernel of an image's system to a directory, with those of its modules that a guest boots with; returns the system.

    `run` runs a command in the VM that has the image; `handed_out` is its second disk, of `HANDED_OUT_BYTES`, by which files come
    many times as fast as over its console. Raises NoSystemError where there is none that boots here.
    """
    vm = _Look(run, handed_out)
    found = _look(vm)
    entry = chosen_entry(_texts(vm, found.configs))
    device, prefix = _root(found, entry)
    kernel = _kernel(found, entry, device)
    image = directory / KERNEL_FILE
    image.write_bytes(vm.take(f"head -c {LARGEST_KERNEL} {shlex.quote(f'/mnt/{kernel[0]}/{kernel[1]}')}"))
    options = re.findall(r"(?:^|\s)rootflags=(\S+)", entry.options) if entry else []
    if not options and prefix != ".":
        options = [f"subvol={prefix}"]
    words = [word for word in (entry.options.split() if entry else []) if not NOT_TAKEN.fullmatch(word)]
    if not any(word.startswith("root=") for word in words):
        words.insert(0, f"root=UUID={found.systems[device].uuid}")
    system = System(device, found.systems[device].type, ",".join(options[-1:]), " ".join([*words, "console=ttyS0"]))
    try:
        release = inspect_kernel(image).release
    except InvalidConfigError as error:
        raise NoSystemError(f"its kernel {kernel[1]!r}: {error}") from error
    if release and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+_~-]*", release):
        _take_modules(vm, f"/mnt/{device}/{prefix}", release, system.type, directory)
    system.write(directory)
    return system


@dataclass(frozen=True, slots=True)
class _Look:
    """The VM that looks at an image: what runs its commands, and its second disk."""

    run: Run
    handed_out: Path

    def ask(self, script: str, data: bytes | None = None) -> str:
        """Return what a command says."""
        done = self.run(script, data)
        if done.returncode != 0:
            raise NoSystemError(f"the VM that was to look at it could not: {done.stderr.strip()[:300]!r}")
        return done.stdout

    def take(self, script: str) -> bytes:
        """Return what a command writes, by way of the second disk."""
        size = self.ask(f"set -o pipefail; {{ {script}; }} | tee /dev/vdb | wc -c && sync")
        with self.handed_out.open("rb") as file:
            return file.read(min(int(size), HANDED_OUT_BYTES))


def _look(vm: _Look) -> _Found:
    listed = vm.ask("until [ -b /dev/vda ]; do usleep 10000; done; cd /sys/class/block && ls -d vda*")
    devices = sorted(re.findall(r"^vda\d{0,3}$", listed, re.M), key=lambda name: int(name[3:] or 0))
    partitions = devices[1 : MOST_PARTITIONS + 1] or devices[:1]
    # Each of the same size, however small the partition.
    heads = vm.take("; ".join(f"dd if=/dev/{device} bs={HEAD_BYTES} count=1 conv=sync 2>/dev/null" for device in partitions))
    systems, others = {}, []
    for number, device in enumerate(partitions):
        head = heads[number * HEAD_BYTES : (number + 1) * HEAD_BYTES]
        if (system := identify(head)) is not None:
            systems[device] = system
        elif other := what_else(head):
            others.append(f"{device} is {other}")
    script = resources.files(__package__).joinpath("inspect.sh").read_text()
    lines = "".join(f"{device} {system.type}\n" for device, system in systems.items())
    said = [match.groups() for line in vm.ask(script, lines.encode()).splitlines() if (match := SAID.fullmatch(line))]
    others += [f"{device} ({systems[device].type}) cannot be mounted: {why}" for what, device, why in said if what == "refused"]

    def places(kind: str) -> list[tuple[str, str]]:
        return [(device, path) for what, device, path in said if what == kind and device in systems]

    found = _Found(systems, places("root"), places("kernel"), places("config"))
    if not found.roots:
        seen = [f"{device} is {systems[device].type}, without an init" for device, _ in places("mounted")]
        what = "; ".join([*seen, *others]) or f"no file system that is known here, in {len(partitions)} partition(s)"
        raise NoSystemError(f"it has {what}")
    return found


def _texts(vm: _Look, configs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return a boot loader's files by their paths."""
    import tarfile

    if not configs:
        return {}
    paths = [f"{device}/{path}" for device, path in configs]
    texts = {}
    with tarfile.open(fileobj=io.BytesIO(vm.take(f"cd /mnt && tar -chf - {shlex.join(paths)}"))) as archive:
        for member in archive:
            if member.isreg() and (file := archive.extractfile(member)):
                texts[f"/{member.name}"] = file.read(LARGEST_TEXT).decode(errors="replace")
    return texts


def _root(found: _Found, entry: BootEntry | None) -> tuple[str, str]:
    """Return the device and the subvolume of the root that an entry names, else the first there is."""
    words = entry.options.split() if entry else []
    named = next((word.removeprefix("root=").replace('"', "") for word in words if word.startswith("root=")), "")
    subvolume = next((match[1].strip("/") for word in words if (match := re.search(r"^rootflags=.*?subvol=([^,\s]+)", word))), None)

    def is_named(device: str) -> bool:
        system, number = found.systems[device], device.removeprefix("vda")
        names = (
            f"UUID={system.uuid}",
            f"LABEL={system.label}",
            *(f"/dev/{disk}{number}" for disk in ("vda", "sda", "xvda", "hda")),
        )
        return named.lower() in map(str.lower, names)

    roots = [root for root in found.roots if is_named(root[0])] or found.roots
    return next((root for root in roots if root[1] == subvolume), roots[0])


def _kernel(found: _Found, entry: BootEntry | None, root: str) -> tuple[str, str]:
    """Return the device and path of the kernel that an entry names, else of the newest, on the root's own file system first.

    An entry's path may begin at another file system, or with a subvolume.
    """
    paths = {path: (device, path) for device, path in found.kernels}
    if entry is not None:
        wanted = PurePosixPath(re.sub(r"^\([^)]*\)", "", entry.kernel)).name
        named = [place for place in found.kernels if PurePosixPath(place[1]).name == wanted]
        if named:
            return min(named, key=lambda place: not f"/{place[1]}".endswith(entry.kernel))
    own = newest(path for device, path in found.kernels if device == root)
    if (path := own or newest(paths)) is None:
        raise NoSystemError(f"it has a system on {root}, and no kernel: none in /boot or beside its modules. Name one: kernel=PATH")
    return paths[path]


def _take_modules(vm: _Look, place: str, release: str, root_type: str, directory: Path) -> None:
    """Unpack the modules that a guest with such a root boots with, and what they depend on, as `lib/modules/RELEASE`."""
    import tarfile

    trees = f"{place}/usr/lib/modules/{release} {place}/lib/modules/{release}"
    enter = f"for tree in {trees}; do cd $tree 2>/dev/null && break; done"
    text = vm.take(f"{enter}; cat modules.dep 2>/dev/null || true").decode(errors="replace")
    wanted = list(_with_dependencies(text, (*MODULES, *MODULES_OF.get(root_type, ()))))
    if wanted:
        target = directory / "lib" / "modules" / release
        target.joinpath("kernel").mkdir(parents=True)
        with tarfile.open(fileobj=io.BytesIO(vm.take(f"{enter}; tar -chf - {shlex.join(wanted)}"))) as archive:
            for path in wanted:
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                file = archive.extractfile(path)
                assert file is not None
                (target / path).write_bytes(file.read())


def _with_dependencies(text: str, names: Sequence[str]) -> Iterator[str]:
    """Yield the paths of modules and of all that they depend on, by the text of a modules.dep (modules.dep(5))."""
    lines = [line.partition(":") for line in text.splitlines() if re.fullmatch(r"[A-Za-z0-9_./:, +-]+", line)]
    needs = {path: rest.split() for path, _, rest in lines if path.startswith("kernel/")}
    paths = {PurePosixPath(path).name.split(".ko")[0].replace("-", "_"): path for path in needs}
    for path in dict.fromkeys(each for name in names if name in paths for each in (paths[name], *needs[paths[name]])):
        if path.startswith("kernel/") and ".." not in path:
            yield path

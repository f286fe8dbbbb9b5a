"""What system is on an image, found out in a VM of ours that has it as a disk; the host itself never reads what is on it.

What comes from there is the image's, and not trusted: lines are matched whole, sizes bounded, of archives the files taken that were
asked for.
"""

from __future__ import annotations

import json
import re
import shlex
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path, PurePosixPath

from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.guest.images.boot_entries import BootEntry, chosen_entry, newest
from pytest_chvm.guest.images.superblocks import (
    HEAD_BYTES,
    MOST_PARTITIONS,
    FileSystem,
    Partition,
    identify,
    partitions,
    what_else,
)
from pytest_chvm.guest.kernels.kernel import inspect_kernel
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
SAID = re.compile(r"(mounted|refused|root|kernel|config|cloud-init) (vda\d{0,3}) ([ -~]{0,1000})")
LARGEST_TEXT, HANDED_OUT_BYTES = 1 << 20, 512 << 20
SYSTEM_FILE, KERNEL_FILE = "system.json", "kernel"


class NoSystemError(Exception):
    """There is no system on an image that boots here; the message says what there is."""


@dataclass(frozen=True, slots=True)
class System:
    """The system on an image: where its root is on the disk, and what its kernel is told.

    `device`: the partition's name in a guest, or the disk's. `options`: what its root is mounted with. `cloud_init`: whether it has
    something that reads a seed.
    """

    device: str
    type: str
    options: str
    cmdline: str
    cloud_init: bool

    def write(self, directory: Path) -> None:
        """Keep it in a directory, beside its kernel and modules."""
        (directory / SYSTEM_FILE).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, directory: Path) -> System:
        """Return what `write` kept."""
        return cls(**json.loads((directory / SYSTEM_FILE).read_text()))


@dataclass(frozen=True, slots=True)
class _Found:
    """What a VM has seen on a disk: by device its file systems and partitions; roots and what is in them as (device, path)."""

    systems: Mapping[str, FileSystem]
    partitions: Mapping[str, Partition]
    roots: Sequence[tuple[str, str]]
    kernels: Sequence[tuple[str, str]]
    configs: Sequence[tuple[str, str]]
    cloud_inits: Sequence[tuple[str, str]]


def take_system(run: Run, handed_out: Path, directory: Path) -> System:
    """Write the kernel of an image's system to a directory, with those of its modules that a guest boots with; returns the system.

    `run` runs a command in the VM that has the image; `handed_out` is its second disk, of `HANDED_OUT_BYTES`, by which files come
    many times as fast as over its console. Raises NoSystemError where there is none that boots here.
    """
    try:
        return _take_system(_Look(run, handed_out), directory)
    except (tarfile.TarError, KeyError, ValueError) as error:
        raise NoSystemError(f"what was read of it makes no sense: {error!r:.200}") from error


def _take_system(vm: _Look, directory: Path) -> System:
    found = _look(vm)
    entry = chosen_entry(_texts(vm, found.configs))
    device, prefix = _root(found, entry)
    kernel = _kernel(found, entry, device)
    options = re.findall(r"(?:^|\s)rootflags=(\S+)", entry.options) if entry else []
    if not options and prefix != ".":
        options = [f"subvol={prefix}"]
    words = [word for word in (entry.options.split() if entry else []) if not NOT_TAKEN.fullmatch(word)]
    if not any(word.startswith("root=") for word in words):
        words.insert(0, f"root=UUID={found.systems[device].uuid}")
    cloud_init = (device, prefix) in found.cloud_inits
    system = System(device, found.systems[device].type, ",".join(options[-1:]), " ".join(words), cloud_init)
    if kernel is not None:
        _take_kernel(vm, kernel, f"/mnt/{device}/{prefix}", system, directory)
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

    def take_files(self, directory: str, paths: Sequence[str]) -> dict[str, bytes]:
        """Return the files there are of some below a directory of the VM's, by way of the second disk."""
        listed = "".join(f"{path}\n" for path in paths).encode()
        # An archive ends by itself, whatever was on the disk before.
        self.ask(
            f'cd {shlex.quote(directory)}; while read -r file; do [ -f "$file" ] && set -- "$@" "$file"; done; '
            'if [ $# = 0 ]; then dd if=/dev/zero bs=1024 count=1; else tar -chf - "$@"; fi >/dev/vdb && sync',
            listed,
        )
        found = {}
        with tarfile.open(self.handed_out, "r:") as archive:
            for member in archive:
                if member.name in paths and member.isreg() and (file := archive.extractfile(member)):
                    found[member.name] = file.read()
        return found


def _look(vm: _Look) -> _Found:
    listed = vm.ask("until [ -b /dev/vda ]; do usleep 10000; done; cd /sys/class/block && ls -d vda*")
    devices = sorted(re.findall(r"^vda\d{0,3}$", listed, re.M), key=lambda name: int(name[3:] or 0))
    heads = _heads(vm, devices[: MOST_PARTITIONS + 1])
    named = partitions(heads["vda"])
    looked_at = devices[1 : MOST_PARTITIONS + 1] or devices[:1]
    systems, others = {}, []
    for device in looked_at:
        if (system := identify(heads[device])) is not None:
            systems[device] = system
        elif other := what_else(heads[device]):
            others.append(f"{device} is {other}")
    script = resources.files(__package__).joinpath("inspect.sh").read_text()
    lines = "".join(f"{device} {system.type}\n" for device, system in systems.items())
    said = [match.groups() for line in vm.ask(script, lines.encode()).splitlines() if (match := SAID.fullmatch(line))]
    others += [f"{device} ({systems[device].type}) cannot be mounted: {why}" for what, device, why in said if what == "refused"]

    def places(kind: str) -> list[tuple[str, str]]:
        return [(device, path.removeprefix("./")) for what, device, path in said if what == kind and device in systems]

    in_table = {f"vda{number}": partition for number, partition in named.items()}
    found = _Found(systems, in_table, places("root"), places("kernel"), places("config"), places("cloud-init"))
    if not found.roots:
        seen = [f"{device} is {systems[device].type}, without an init" for device, _ in places("mounted")]
        raise NoSystemError("; ".join([*seen, *others]) or f"nothing known here begins {' or '.join(looked_at)}")
    return found


def _heads(vm: _Look, devices: Sequence[str]) -> dict[str, bytes]:
    """Return how each device begins."""
    # Each of the same size, however small the partition.
    vm.ask(f"{{ {'; '.join(f'dd if=/dev/{device} bs={HEAD_BYTES} count=1 conv=sync' for device in devices)}; }} >/dev/vdb && sync")
    with vm.handed_out.open("rb") as file:
        return {device: file.read(HEAD_BYTES) for device in devices}


def _texts(vm: _Look, configs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return a boot loader's files by their paths."""
    files = vm.take_files("/mnt", [f"{device}/{path}" for device, path in configs])
    return {f"/{path}": data[:LARGEST_TEXT].decode(errors="replace") for path, data in files.items()}


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
        if (partition := found.partitions.get(device)) is not None:
            names += (f"PARTUUID={partition.uuid}", f"PARTLABEL={partition.label}")
        return named.lower() in map(str.lower, names)

    roots = [root for root in found.roots if is_named(root[0])] or found.roots
    return next((root for root in roots if root[1] == subvolume), roots[0])


def _kernel(found: _Found, entry: BootEntry | None, root: str) -> tuple[str, str] | None:
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
    path = own or newest(paths)
    return None if path is None else paths[path]


def _take_kernel(vm: _Look, kernel: tuple[str, str], root: str, system: System, directory: Path) -> None:
    """Keep a kernel, and as `lib/modules/RELEASE` those of its modules below `root` that it boots with."""
    device, path = kernel
    image = directory / KERNEL_FILE
    image.write_bytes(vm.take_files(f"/mnt/{device}", [path])[path])
    try:
        release = inspect_kernel(image).release
    except InvalidConfigError as error:
        raise NoSystemError(f"its kernel {path!r}: {error}") from error
    if not release or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+_~-]*", release):
        return
    for tree in (f"{root}/usr/lib/modules/{release}", f"{root}/lib/modules/{release}"):
        if dependencies := vm.take_files(tree, ["modules.dep"]):
            text = dependencies["modules.dep"].decode(errors="replace")
            wanted = list(_with_dependencies(text, (*MODULES, *MODULES_OF.get(system.type, ()))))
            target = directory / "lib" / "modules" / release
            target.joinpath("kernel").mkdir(parents=True)
            for module, data in vm.take_files(tree, wanted).items():
                (target / module).parent.mkdir(parents=True, exist_ok=True)
                (target / module).write_bytes(data)
            return


def _with_dependencies(text: str, names: Sequence[str]) -> Iterator[str]:
    """Yield the paths of modules and of all that they depend on, by the text of a modules.dep (modules.dep(5))."""
    lines = [line.partition(":") for line in text.splitlines() if re.fullmatch(r"[A-Za-z0-9_./:, +-]+", line)]
    needs = {path: rest.split() for path, _, rest in lines if path.startswith("kernel/")}
    paths = {PurePosixPath(path).name.split(".ko")[0].replace("-", "_"): path for path in needs}
    for path in dict.fromkeys(each for name in names if name in paths for each in (paths[name], *needs[paths[name]])):
        if path.startswith("kernel/") and ".." not in path:
            yield path

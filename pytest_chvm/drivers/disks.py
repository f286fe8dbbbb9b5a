"""Disk images: their formats, and the throwaway overlay that keeps a root disk from being written."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pytest_chvm.base.untouched import random_hex
from pytest_chvm.drivers.boot import ROOT_FILE, Boot
from pytest_chvm.drivers.memory import copy_sparse
from pytest_chvm.errors import HostError, InvalidConfigError, MissingRequirementError, UnsupportedError
from pytest_chvm.model import MODULES, ROOT, SEED, AnyDisk, DiskKind, EmptyDisk, VmConfig, VmDisk, plugged_into_clones

QCOW2_MAGIC = b"QFI\xfb"
# Incompatible feature bits (QEMU's docs/interop/qcow2.txt): dirty (refcounts may be wrong), external data file.
DIRTY, DATA_IN_ANOTHER_FILE = 1, 4
OVERLAY_TIMEOUT_S = 30.0
# Where the last disk is on the PCI bus: in the place behind it a q35 has its own devices.
LAST_SLOT = 30
# Of the file of a disk that was made empty.
EMPTY_SUFFIX = ".empty.raw"
# An overlay goes elsewhere than to the disk only where the disk has less.
ROOM = 1 << 30
# Cloud Hypervisor follows ten; a name has 1023 bytes at most.
LONGEST_CHAIN, LONGEST_NAME = 10, 1023


def base_format(image: Path) -> str:
    """Return "qcow2" or "raw" for an image that is never written, by how it begins."""
    with image.open("rb") as file:
        return "qcow2" if file.read(4) == QCOW2_MAGIC else "raw"


def data_format(image: Path) -> str:
    """Return "qcow2" or "raw" for an image that a guest writes, by its name alone.

    By its content a guest could turn a raw disk into a qcow2 whose backing file is one of the host's. Raises
    InvalidConfigError where name and content disagree.
    """
    named = "qcow2" if image.suffix == ".qcow2" else "raw"
    found = base_format(image)
    if named != found:
        raise InvalidConfigError(
            f"data_disk {str(image)!r} begins like a {found} image and is named like a {named} one: "
            f"name it {'*.qcow2' if found == 'qcow2' else 'otherwise than *.qcow2'} if that is what it is"
        )
    return named


def backing_files(image: Path) -> list[Path]:
    """Return the backing files of a qcow2 image, the nearest first; none for another format.

    QEMU's docs/interop/qcow2.txt: at byte 8 where the name is, at byte 16 how long; a relative one is beside the image.
    """
    found: list[Path] = []
    while len(found) < LONGEST_CHAIN and image.is_file():
        with image.open("rb") as file:
            head = file.read(20)
            offset, length = int.from_bytes(head[8:16]), int.from_bytes(head[16:20])
            if head[:4] != QCOW2_MAGIC or not offset or not 0 < length <= LONGEST_NAME:
                break
            file.seek(offset)
            image = image.parent / os.fsdecode(file.read(length))
        found.append(image)
    return found


def plain_images(image: Path) -> list[Path]:
    """Return an image and its backing files.

    Raises UnsupportedError where one is not a plain file that holds all of its data, OSError where one cannot be read.
    """
    images = [image, *backing_files(image)]
    if len(images) > LONGEST_CHAIN and backing_files(images[-1]):
        raise UnsupportedError(f"{str(image)!r} stands on more than {LONGEST_CHAIN} images")
    for each in images:
        if not each.is_file():
            raise UnsupportedError(f"{str(each)!r} is not a plain file")
        if _incompatible_features(each) & DATA_IN_ANOTHER_FILE:
            raise UnsupportedError(f"{str(each)!r} has its data in another file")
    return images


def image_format(image: Path, *, read_only: bool) -> str:
    """Return "qcow2" or "raw" for an image as a guest may use it."""
    return base_format(image) if read_only else data_format(image)


@dataclass(frozen=True, slots=True)
class DiskFile:
    """The file that a VMM opens for a disk: its image, the overlay that keeps this from being written, or one of its own."""

    kind: DiskKind
    path: Path
    format: str

    @property
    def size(self) -> int:
        """The bytes that a raw one has."""
        return self.path.stat().st_size


def disk_files(boot: Boot) -> list[DiskFile]:
    """Return the file of each disk that a VMM is started with; a clone's others are plugged in.

    Makes overlays and empty disks; raises what `make_overlay` does.
    """
    config = boot.config
    for disk in config.all_disks:
        if disk.kind.throwaway and isinstance(disk, VmDisk):
            _make_root_overlay(disk, boot)
        elif isinstance(disk, EmptyDisk):
            _make_empty_disk(disk, boot)
    plugged = plugged_into_clones(config.all_disks) if boot.restoring is not None else ()
    place = boot.options.template_dir or boot.lease.directory
    files = [_disk_file(disk, place) for disk in config.all_disks if disk not in plugged]
    modules = boot.options.modules_disk
    return files if modules is None else [*files, DiskFile(MODULES, modules, "raw")]


def plugged_files(config: VmConfig, run_dir: Path) -> list[DiskFile]:
    """Return the file of each disk that a clone has plugged in, in their order."""
    return [_disk_file(disk, run_dir) for disk in plugged_into_clones(config.all_disks)]


def _disk_file(disk: AnyDisk, place: Path) -> DiskFile:
    if isinstance(disk, EmptyDisk):
        return DiskFile(disk.kind, place / _file_of(disk), "raw")
    if disk.kind.throwaway:
        return DiskFile(disk.kind, place / ROOT_FILE, "qcow2")
    # A seed is an ISO, and is checked to be one.
    form = "raw" if disk.kind is SEED else image_format(disk.image, read_only=disk.kind.read_only)
    return DiskFile(disk.kind, disk.image, form)


def _make_root_overlay(disk: VmDisk, boot: Boot) -> None:
    overlay = (boot.options.template_dir or _scratch(boot, ROOT_FILE)) / ROOT_FILE
    make_overlay(disk.image if boot.restoring is None else boot.restoring / ROOT_FILE, overlay)


def _file_of(disk: EmptyDisk) -> str:
    """Return the name of an empty disk's file: in a run directory, and in a snapshot's."""
    return f"{disk.kind.id}{EMPTY_SUFFIX}"


def _make_empty_disk(disk: EmptyDisk, boot: Boot) -> None:
    """Make the file of an empty disk, or a copy of that of the VM that was saved."""
    name = _file_of(disk)
    file = (boot.options.template_dir or _scratch(boot, name)) / name
    with file.open("xb") as made:
        made.truncate(disk.size_mb << 20)
        if boot.restoring is not None and (saved := boot.restoring / name).exists():
            copy_sparse(saved, made.fileno())


def save_empty_disks(run_dir: Path, directory: Path) -> None:
    """Copy what a paused VM has written to disks that were made empty into a snapshot's directory."""
    for file in run_dir.glob(f"*{EMPTY_SUFFIX}"):
        with (directory / file.name).open("xb") as copy:
            copy_sparse(file, copy.fileno())


def default_cmdline(config: VmConfig) -> str:
    """Return the kernel command line of a VM that was given none."""
    has_root = any(disk.kind is ROOT for disk in config.all_disks)
    console = config.architecture.console_word
    return f"{console} root=/dev/vda1 rw ds=nocloud" if has_root else console


def _scratch(boot: Boot, name: str) -> Path:
    """Return a directory for a file that the guest writes: one where snapshots go, linked to from the run directory, in memory.

    The run directory itself where there is no such place, or less room.
    """
    own = boot.lease.directory
    if boot.options.snapshots is None or _free(boot.options.snapshots) < min(ROOM, _free(own)):
        return own
    if boot.scratch is None:
        boot.scratch = boot.options.snapshots / random_hex(8)
        boot.lease.add_path(boot.scratch)
        boot.scratch.mkdir(mode=0o700)
    (own / name).symlink_to(boot.scratch / name)
    return boot.scratch


def _free(place: Path) -> int:
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


def check_was_closed(overlay: Path) -> None:
    """Raise UnsupportedError where a VMM did not close an overlay, so that what it knew of it is lost.

    Cloud Hypervisor marks an image dirty while it writes to it; QEMU never does, and has all in the file when a VM is paused.
    """
    if _incompatible_features(overlay) & DIRTY:
        raise UnsupportedError(f"the VMM has not written all of the disk {str(overlay)!r}")


def _incompatible_features(image: Path) -> int:
    """Return the bits of what a reader of a qcow2 image has to know, at byte 72 of version 3; 0 for another image."""
    with image.open("rb") as file:
        head = file.read(80)
    return int.from_bytes(head[72:]) if head[:8] == QCOW2_MAGIC + b"\0\0\0\3" else 0


def make_overlay(base: Path, overlay: Path) -> None:
    """Make an empty qcow2 image on top of `base`, which takes all writes.

    Raises InvalidConfigError where there is no qemu-img, HostError where it fails.
    """
    error = _qemu_img("create", "-q", "-f", "qcow2", "-F", base_format(base), "-b", base, overlay)
    if error is not None:
        raise HostError(f"no overlay of root_disk {str(base)!r} can be made at {str(overlay)!r}: {error}")


def copy_overlay(overlay: Path, copy: Path) -> None:
    """Copy an overlay that nobody writes just now; the copy stands on no other overlay of that name, which may go before it does.

    Raises what `make_overlay` does, and HostError where something that it stands on is not there any more.
    """
    chain = backing_files(overlay)
    for image in chain:
        if not image.is_file():
            raise HostError(
                f"{str(image)!r}, which this disk stands on, is gone: close a snapshot after its clones have been saved"
            )
    with copy.open("xb") as file:
        copy_sparse(overlay, file.fileno())
    base = next((image for image in chain if image.name != overlay.name), chain[-1])
    if base != chain[0]:
        error = _qemu_img("rebase", "-q", "-f", "qcow2", "-F", base_format(base), "-b", base, copy)
        if error is not None:
            raise HostError(f"the overlay {str(overlay)!r} cannot be copied to {str(copy)!r}: {error}")


def _qemu_img(*words: str | Path) -> str | None:
    """Run qemu-img; returns what it says where it fails. Raises InvalidConfigError where there is none."""
    program = shutil.which("qemu-img")
    if program is None:
        raise MissingRequirementError(
            "root_disk needs qemu-img for its throwaway overlay: install qemu-utils (Debian, Ubuntu) or qemu-img (Fedora)"
        )
    try:
        done = subprocess.run(
            [program, *words], capture_output=True, text=True, errors="replace", timeout=OVERLAY_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"qemu-img has not ended within {OVERLAY_TIMEOUT_S:g} s"
    return done.stderr.strip() if done.returncode != 0 else None

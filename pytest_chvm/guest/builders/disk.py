"""A tree of files as a disk that boots by UEFI and by a kernel from outside: GPT, an EFI system partition, an ext4 root.

Nothing is mounted and no loop device is used: each program writes its part of one file, without root.
"""

from __future__ import annotations

import os
import shlex
import tarfile
from dataclasses import dataclass
from pathlib import Path

from pytest_chvm.base.trees import remove_tree
from pytest_chvm.base.untouched import random_hex
from pytest_chvm.errors import HostError, InvalidConfigError
from pytest_chvm.guest.builders.tools import run_tool

SECTOR = 512
# In MiB: the EFI system partition, with room for a kernel and its initramfs, before the root; the second partition table behind it.
ESP_AT_MB, ESP_MB, TAIL_MB = 1, 126, 1
ROOT_AT_MB = ESP_AT_MB + ESP_MB + 1
# What ext4 itself takes of a disk: its journal and inodes, and what only root may use.
FILE_SYSTEM_MB = 96
# UEFI specification, 5.3.3, and the Discoverable Partitions Specification.
ESP_TYPE, ROOT_TYPE = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B", "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"
# The boot loader's place in the tree, and on the partition where firmware looks for it.
LOADER, LOADER_ON_ESP = "usr/lib/systemd/boot/efi/systemd-bootx64.efi", "EFI/BOOT/BOOTX64.EFI"


@dataclass(frozen=True, slots=True)
class Layout:
    """How large a disk is, in MiB, the UUID of its root file system, and what its kernel is told beside the root."""

    size_mb: int
    root_uuid: str
    title: str
    cmdline: str


def make_disk(archive: Path, layout: Layout, directory: Path, target: Path) -> None:
    """Make a qcow2 image of the files in a tar archive, which it removes; `directory` is for what is in between.

    The archive has a kernel and its initramfs in `/boot`, and systemd-boot. Raises InvalidConfigError where the disk is too small,
    HostError where a program fails.
    """
    raw, tree = directory / "disk.raw", directory / "tree"
    needed_mb = (_content_bytes(archive) >> 20) + ROOT_AT_MB + FILE_SYSTEM_MB + TAIL_MB
    if layout.size_mb < needed_mb:
        raise InvalidConfigError(f"size_mb={layout.size_mb} is too small for what is installed: it needs {needed_mb}")
    with raw.open("xb") as file:
        file.truncate(layout.size_mb << 20)
    _partition(raw, layout)
    _fill_root(raw, archive, tree, layout)
    archive.unlink()
    _fill_esp(raw, tree, layout, directory)
    run_tool(["qemu-img", "convert", "-O", "qcow2", raw, target])
    raw.unlink()
    if failures := remove_tree(tree):
        raise HostError("; ".join(failures))


def _content_bytes(archive: Path) -> int:
    with tarfile.open(archive) as tar:
        return sum(-(-member.size // 4096) * 4096 + 256 for member in tar)


def _partition(raw: Path, layout: Layout) -> None:
    esp, root = (f"start={at}MiB, size={size}MiB" for at, size in ((ESP_AT_MB, ESP_MB), (ROOT_AT_MB, _root_mb(layout))))
    table = f"label: gpt\n{esp}, type={ESP_TYPE}, name=esp\n{root}, type={ROOT_TYPE}, name=root\n"
    run_tool(["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", raw], table)


def _root_mb(layout: Layout) -> int:
    return layout.size_mb - ROOT_AT_MB - TAIL_MB


def _fill_root(raw: Path, archive: Path, tree: Path, layout: Layout) -> None:
    """Unpack the archive and make the root file system of it, under fakeroot: owners and devices are as in the archive.

    A file that not even its owner may read has to be read here; fakeroot, which is not told, still has the archive's mode for it.
    """
    script = (
        'mkdir "$2" && tar -x --numeric-owner --xattrs --xattrs-include="*" -f "$1" -C "$2" && '
        'env -u LD_PRELOAD chmod -R u+rwX "$2" && '
        'mke2fs -q -F -t ext4 -L root -U "$4" -E "offset=$5,root_owner=0:0" -d "$2" "$3" "$6"'
    )
    offset, size = ROOT_AT_MB << 20, f"{_root_mb(layout)}M"
    run_tool(["fakeroot", "--", "sh", "-ec", script, "sh", archive, tree, raw, layout.root_uuid, str(offset), size])


def _fill_esp(raw: Path, tree: Path, layout: Layout, directory: Path) -> None:
    """Put systemd-boot on the EFI system partition, the kernel that it boots, and an entry for it (Boot Loader Specification)."""
    kernel, release = _kernel(tree)
    entry = directory / "entry"
    entry.write_text(
        f"title {layout.title}\nversion {release}\nlinux /{kernel.name}\ninitrd /initrd.img-{release}\n"
        f"options root=UUID={layout.root_uuid} {layout.cmdline}\n"
    )
    loader = directory / "loader.conf"
    loader.write_text("timeout 0\n")
    partition = f"{os.fspath(raw)}@@{ESP_AT_MB}M"
    run_tool(["mformat", "-i", partition, "-F", "-v", "ESP", "-T", str((ESP_MB << 20) // SECTOR), "::"])
    run_tool(["mmd", "-i", partition, "::/EFI", "::/EFI/BOOT", "::/loader", "::/loader/entries"])
    for source, place in (
        (tree / LOADER, LOADER_ON_ESP),
        (loader, "loader/loader.conf"),
        (entry, f"loader/entries/{shlex.quote(release)}.conf"),
        (kernel, kernel.name),
        (tree / "boot" / f"initrd.img-{release}", f"initrd.img-{release}"),
    ):
        run_tool(["mcopy", "-i", partition, source, f"::/{place}"])
    entry.unlink()
    loader.unlink()


def _kernel(tree: Path) -> tuple[Path, str]:
    kernels = sorted((tree / "boot").glob("vmlinuz-*"))
    if not kernels:
        raise HostError("no kernel was installed: /boot has no vmlinuz-*")
    return kernels[-1], kernels[-1].name.removeprefix("vmlinuz-")


def copy_image(image: Path, target: Path) -> Path:
    """Put a copy of a qcow2 image at `target`, which appears at once: as qcow2 where that is its suffix, else raw; returns it.

    Raises HostError where it cannot be written.
    """
    target = Path(os.path.abspath(target))
    unfinished = target.with_name(f".{target.name}.{random_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        run_tool(["qemu-img", "convert", "-O", "qcow2" if target.suffix == ".qcow2" else "raw", image, unfinished])
        unfinished.replace(target)
    except OSError as error:
        raise HostError(f"the image cannot be written to {str(target)!r}: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return target

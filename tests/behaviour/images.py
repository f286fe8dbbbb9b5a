"""Images for the tests of stock images: as small as they can be, each with the distribution's kernel and its modules."""

import shutil
import subprocess
from pathlib import Path

from pytest_chvm import Settings
from pytest_chvm.base.progress import show_progress
from pytest_chvm.guest.initramfs import find_busybox
from pytest_chvm.guest.kernels.modules import modules_in_order
from pytest_chvm.machine.guest_choice import built_in_kernel, cache_dir

MODULES = (
    "virtio_pci", "virtio_blk", "virtio_console", "virtio_net", "pvpanic_pci", "virtiofs", "xfs", "btrfs", "ext4",
    "crc32c_generic", "xxhash_generic", "blake2b_generic", "sha256_generic", "libcrc32c",
)  # fmt: skip
INITTAB = "::sysinit:/etc/init.d/rcS\n::respawn:/bin/sleep 1000\n"
# Slow, so that who is ready before it is through is found out.
BOOT_SCRIPT = "#!/bin/sh\nsleep 1\necho started >/run/by-the-image\n"
GRUB_CFG = """\
set default="0"
menuentry 'Tiny' --class tiny $menuentry_id_option 'tiny' {{
    linux /boot/vmlinuz-{release} root={root} ro console=tty0 quiet of-the-image
    initrd /boot/initrd.img
}}
menuentry 'Tiny, another' {{
    linux /boot/vmlinuz-0 root={root} another
}}
"""


def tiny_tree(tree: Path, *, root: str = "/dev/sda1") -> Path:
    """Make the root of a system with BusyBox as its init, and a kernel that has its drivers as modules."""
    settings = Settings.resolve()
    kernel = built_in_kernel(settings)
    for name in (
        "bin",
        "sbin",
        "etc/init.d",
        "etc/ssh",
        "boot/grub",
        "dev",
        "proc",
        "sys",
        "run",
        "tmp",
        "mnt",
        "root",
        "var/tmp",
        "usr/bin",
    ):
        (tree / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(find_busybox(cache_dir(settings), show_progress), tree / "bin/busybox")
    applets = subprocess.run([tree / "bin/busybox", "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in applets:
        if applet != "busybox":
            (tree / "bin" / applet).symlink_to("busybox")
    (tree / "sbin/init").symlink_to("/bin/busybox")
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (tree / "etc/inittab").write_text(INITTAB)
    (tree / "etc/init.d/rcS").write_text(BOOT_SCRIPT)
    (tree / "etc/init.d/rcS").chmod(0o755)
    (tree / "etc/machine-id").write_text("0" * 32 + "\n")
    shutil.copy(kernel.image, tree / f"boot/vmlinuz-{kernel.release}")
    (tree / "boot/grub/grub.cfg").write_text(GRUB_CFG.format(release=kernel.release, root=root))
    assert kernel.modules_dir is not None
    for module in modules_in_order(kernel.modules_dir, MODULES):
        target = tree / "lib/modules" / kernel.modules_dir.name / module.path.relative_to(kernel.modules_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(module.path, target)
    subprocess.run([tree / "bin/busybox", "depmod", "-b", tree, kernel.modules_dir.name], check=True, capture_output=True)
    return tree


def partitioned(disk: Path, file_system: Path, *, label: str = "gpt", named: str = "") -> Path:
    """Make a disk whose second partition is that file system; `named` is more that sfdisk(8) is told of it."""
    size = file_system.stat().st_size
    with disk.open("wb") as file:
        file.truncate(size + (4 << 20))
    subprocess.run(
        ["sfdisk", "--quiet", disk],
        input=f"label: {label}\nstart=2048, size=2048\nstart=4096, size={size >> 9}{named}\n",
        text=True,
        check=True,
    )
    put(file_system, disk, at_mb=2)
    return disk


def put(file_system: Path, disk: Path, *, at_mb: int) -> None:
    """Write a file system to a place of a disk."""
    command = ["dd", f"if={file_system}", f"of={disk}", "bs=1M", f"seek={at_mb}", "conv=notrunc,sparse"]
    subprocess.run(command, check=True, capture_output=True)


def ext4(tree: Path, image: Path, size: str = "96M") -> Path:
    """Make an ext4 file system of a tree."""
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, image, size], check=True)
    return image


def xfs(tree: Path, image: Path) -> Path:
    """Make an XFS file system of a tree, by a prototype file (mkfs.xfs(8))."""

    def lines(directory: Path):
        for path in sorted(directory.iterdir()):
            mode = f"{path.lstat().st_mode & 0o777:03o}"
            if path.is_symlink():
                yield f"{path.name} l--777 0 0 {path.readlink()}"
            elif path.is_dir():
                yield f"{path.name} d--{mode} 0 0"
                yield from lines(path)
                yield "$"
            else:
                yield f"{path.name} ---{mode} 0 0 {path}"

    prototype = image.with_name(f"{image.name}.prototype")
    prototype.write_text("\n".join(["/", "0 0", "d--755 0 0", *lines(tree), "$", ""]))
    with image.open("wb") as file:
        file.truncate(320 << 20)
    subprocess.run(["mkfs.xfs", "-q", "-p", prototype, image], check=True, capture_output=True)
    return image


def btrfs(tree: Path, image: Path) -> Path:
    """Make a btrfs file system of a tree."""
    with image.open("wb") as file:
        file.truncate(160 << 20)
    subprocess.run(["mkfs.btrfs", "-q", "--rootdir", tree, image], check=True, capture_output=True)
    return image


def qcow2(image: Path, target: Path) -> Path:
    """Make a compressed qcow2 image on top of one that it stands on."""
    base = target.with_name(f"{target.stem}-base.qcow2")
    subprocess.run(["qemu-img", "convert", "-q", "-c", "-O", "qcow2", image, base], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, target], check=True)
    return target

"""Kernel images: telling before the start whether a VMM can boot a file, and how long a command line its kernel takes.

What a file says of itself may be anything: every field is checked before it is followed, and nothing but InvalidConfigError is
raised.
"""

from __future__ import annotations

import os
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.model import Architecture, architecture

# COMMAND_LINE_SIZE of arch/x86/include/asm/setup.h, less the final NUL.
DEFAULT_CMDLINE_BYTES = 2047
# elf(5): e_machine.
MACHINES = {3: "i386", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
# Which kernels a VMM for a machine can boot.
BOOTABLE = {"x86_64": ("x86_64", "i386"), "aarch64": ("aarch64",), "riscv64": ("riscv64",)}
# Magic numbers of compressed files, and the programs that unpack them.
PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\x02\x21\x4c\x18": ("lz4", "unlz4"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
}
# The only format that VMMs take of other machines' kernels.
IMAGES = {"aarch64": "Image (arch/arm64/boot/Image)", "riscv64": "Image (arch/riscv/boot/Image)"}
PT_LOAD, PT_INTERP, PT_NOTE = 1, 3, 4
# xen/elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY: where a VMM enters.
PVH_NOTE = 18
MULTIBOOT_MAGIC, MULTIBOOT_SEARCH = b"\x02\xb0\xad\x1b", 8192
LARGEST_NOTES = 1 << 20


@dataclass(frozen=True, slots=True)
class KernelImage:
    """A kernel image's format and machine, and the most bytes that its command line may have."""

    format: str
    machine: str
    cmdline_bytes: int = DEFAULT_CMDLINE_BYTES


def check_kernel_image(image: Path, machine: str = platform.machine(), *, called: str | None = None) -> KernelImage:
    """Return what is known of a kernel image; raises InvalidConfigError where no VMM for `machine` can boot it.

    `called`: what an error says that it is about (default: the file).

    The formats are those that VMMs take: bzImage (Documentation/arch/x86/boot.rst), ELF (elf(5)) and, of other machines, Image
    (Documentation/arch/arm64/booting.rst, Documentation/arch/riscv/boot-image-header.rst).
    """
    called = called or f"kernel {str(image)!r}"
    try:
        with image.open("rb") as file:
            found = _read(file, machine)
    except OSError as error:
        raise InvalidConfigError(f"{called} cannot be read: {error.strerror}") from error
    except _NoKernelError as error:
        raise InvalidConfigError(f"{called} {error}") from None
    if machine in BOOTABLE and found.machine not in BOOTABLE[machine]:
        whose = "this machine" if machine == platform.machine() else "the VM"
        raise InvalidConfigError(
            f"{called} is a {found.format} for {found.machine}, and {whose} is {machine}: name a kernel for that, or "
            f"say arch={found.machine!r}"
        )
    return found


def machine_of(head: bytes) -> str | None:
    """Return the machine that a kernel image is for, by its first 64 bytes or more; None where it is no image.

    An ELF file that does not say is one of this machine's.
    """
    if head[0x202:0x206] == b"HdrS":
        return "x86_64"
    if head[:4] == b"\x7fELF":
        code = int.from_bytes(head[18:20], "little")
        return MACHINES.get(code, f"machine {code} (elf(5))") if code else platform.machine()
    return {b"ARM\x64": "aarch64", b"RSC\x05": "riscv64"}.get(head[56:60])


class _NoKernelError(Exception):
    """The file cannot be booted; the message continues after the file's name."""


def _read(file: BinaryIO, machine: str) -> KernelImage:
    size = os.fstat(file.fileno()).st_size
    head = file.read(4096)
    if head[0x202:0x206] == b"HdrS":
        return _bzimage(head, size)
    if head[:4] == b"\x7fELF":
        return _elf(file, head, size, machine)
    if head[56:60] == b"ARM\x64":
        return KernelImage("arm64 Image", "aarch64")
    if head[56:60] == b"RSC\x05":
        return KernelImage("RISC-V Image", "riscv64", architecture("riscv64").cmdline_bytes)
    if head[:2] == b"MZ" and head[4:8] == b"zimg":
        raise _NoKernelError(
            "is an EFI zboot image, which only firmware can unpack: name the image that it is made of, in the kernel's build, or "
            "unpack it with 'unzboot'"
        )
    if head[:2] == b"MZ":
        raise _NoKernelError(
            "is an EFI program and no bzImage: of a unified kernel image, name the kernel in it "
            "('objcopy -O binary --only-section=.linux IMAGE vmlinuz')"
        )
    for magic, (name, tool) in PACKED.items():
        if head.startswith(magic):
            raise _NoKernelError(f"is packed with {name}, which no VMM unpacks: run '{tool}' on it, and name what comes out")
    raise _NoKernelError(
        "is not a kernel: expected a bzImage, an ELF vmlinux (both of x86_64) or an Image (aarch64, riscv64), and it begins with "
        f"{head[:8].hex(' ') or 'nothing: it is empty'}"
    )


def _bzimage(head: bytes, size: int) -> KernelImage:
    # The rest of a header that is cut off reads as zeros.
    head = head.ljust(0x268, b"\0")
    (version,) = struct.unpack_from("<H", head, 0x206)
    (paragraphs,) = struct.unpack_from("<I", head, 0x1F4)
    if version < 0x204:
        # Only two of the bytes are the field's.
        paragraphs &= 0xFFFF
    expected = ((head[0x1F1] or 4) + 1) * 512 + paragraphs * 16
    # Without a length a truncated file cannot be told.
    if paragraphs and size < expected:
        raise _NoKernelError(f"is cut off: its header says {expected} bytes, and it has {size}; copy or download it again")
    (cmdline_bytes,) = struct.unpack_from("<I", head, 0x238)
    return KernelImage("bzImage", "x86_64", cmdline_bytes if version >= 0x206 and cmdline_bytes else DEFAULT_CMDLINE_BYTES)


@dataclass(frozen=True, slots=True)
class _Segment:
    kind: int
    offset: int
    size: int


def _elf(file: BinaryIO, head: bytes, size: int, machine: str) -> KernelImage:
    """Look at an ELF file: its program headers say what must be in it, and where a VMM enters."""
    if not head[4:64].strip(b"\0"):
        # An unknown format: the VMM will say what it makes of it.
        return KernelImage("ELF file", machine)
    bits = {1: 32, 2: 64}.get(head[4] if len(head) > 5 else 0)
    if bits is None or head[5] != 1 or len(head) < 52:
        raise _NoKernelError("is an ELF file that is cut off, or not of a little-endian machine: it is no kernel that boots here")
    code = int.from_bytes(head[18:20], "little")
    found = KernelImage("ELF file", MACHINES.get(code, f"machine {code} (elf(5))"))
    if found.machine not in BOOTABLE.get(machine, (found.machine,)):
        return found
    segments = list(_segments(file, head, bits))
    if any(segment.kind == PT_INTERP for segment in segments):
        raise _NoKernelError("is a program for Linux (an ELF file with an interpreter), and no kernel")
    loads = [segment for segment in segments if segment.kind == PT_LOAD]
    if not loads:
        raise _NoKernelError("is an ELF file with nothing to load (an object file or a module?), and no kernel")
    end = max(segment.offset + segment.size for segment in loads)
    if size < end:
        raise _NoKernelError(f"is cut off: its segments end at byte {end}, and it has {size}; copy or download it again")
    if found.machine in IMAGES:
        raise _NoKernelError(
            f"is an ELF file for {found.machine}, which no VMM enters: name the {IMAGES[found.machine]} of the same build"
        )
    is_x86 = found.machine in BOOTABLE["x86_64"]
    if is_x86 and not _has_pvh_entry(file, segments) and not _is_multiboot(file):
        raise _NoKernelError(
            "is an ELF file without the note that says where a VMM enters it. If it is a kernel, name the bzImage of the same "
            "build (arch/x86/boot/bzImage), or build it with CONFIG_PVH"
        )
    return found


def _segments(file: BinaryIO, head: bytes, bits: int) -> Iterator[_Segment]:
    # e_phoff, e_phentsize, e_phnum; then p_type, p_offset, p_filesz of each.
    layout = {64: ("<Q", 32, 54, "<IIQQQQ"), 32: ("<I", 28, 42, "<IIIII")}[bits]
    if len(head) < layout[2] + 4:
        return
    (offset,) = struct.unpack_from(layout[0], head, layout[1])
    entry_size, count = struct.unpack_from("<HH", head, layout[2])
    if entry_size < struct.calcsize(layout[3]) or offset >= 1 << 62:
        return
    file.seek(offset)
    table = file.read(entry_size * count)
    if len(table) < entry_size * count:
        raise _NoKernelError("is cut off: its program headers are not all there; copy or download it again")
    for start in range(0, len(table), entry_size):
        fields = struct.unpack_from(layout[3], table, start)
        yield _Segment(fields[0], *((fields[2], fields[5]) if bits == 64 else (fields[1], fields[4])))


def _has_pvh_entry(file: BinaryIO, segments: list[_Segment]) -> bool:
    """Tell whether an ELF kernel has the note that names its 32-bit entry: owner "Xen", type 18."""
    for segment in segments:
        if segment.kind == PT_NOTE and segment.offset < 1 << 62:
            file.seek(segment.offset)
            notes = file.read(min(segment.size, LARGEST_NOTES))
            if any(struct.pack("<III4s", 4, size, PVH_NOTE, b"Xen\0") in notes for size in (4, 8)):
                return True
    return False


def _is_multiboot(file: BinaryIO) -> bool:
    # QEMU boots these too; the magic number is aligned (Multiboot Specification 0.6.96, 3.1.1).
    file.seek(0)
    head = file.read(MULTIBOOT_SEARCH)
    return any(head[at : at + 4] == MULTIBOOT_MAGIC for at in range(0, len(head), 4))


def why_silent(cmdline: str | None, arch: Architecture) -> str:
    """Return what a person should look at when a kernel printed nothing, one cause after another."""
    words = (cmdline or "").split()
    causes = []
    if not any(word.startswith("console=") for word in words):
        causes.append(f"its command line has no {arch.console_word}")
    if "quiet" in words or any(word.startswith("loglevel=") for word in words):
        causes.append(f"it was told to be quiet: leave out 'quiet' and 'loglevel=', or add '{arch.early_console}'")
    causes.append(f"it has no driver for the serial port (CONFIG_{arch.serial_option})")
    causes.append("the image is damaged, or for another processor than the VM's")
    return f"The kernel printed nothing; likely causes: {'; '.join(causes)}."

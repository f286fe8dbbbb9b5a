"""What QEMU's machine of each processor architecture is made of."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from pytest_chvm.errors import MissingRequirementError

# A number that differs in a clone: its kernel (CONFIG_VMGENID, Linux 5.18 and newer) then reseeds itself before it draws another
# random number. Kernels without that driver are reseeded by `guest/renewal.py` alone.
GENERATION_DEVICE = ("-device", "vmgenid,guid=auto")
# Where the guest's kernel (CONFIG_FW_CFG_SYSFS) says where its own description is, which a dump of its memory is read by.
DESCRIPTION_DEVICE = ("-device", "vmcoreinfo")


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine: its `-machine`, the `-cpu` that has all that software can do, and the devices that all VMs have.

    `firmware`: the files that it loads by itself, from a package of their own that is updated independently. `uefi`: how the
    machines begin for which firmware descriptions name UEFI firmware that fits it. `packages`: what has its QEMU.
    """

    type: str
    cpu: str
    devices: tuple[str, ...]
    firmware: tuple[str, ...]
    uefi: str
    packages: str


MACHINES = {
    "x86_64": Machine(
        "q35", "max", (*GENERATION_DEVICE, *DESCRIPTION_DEVICE),
        ("bios-256k.bin", "linuxboot_dma.bin", "pvh.bin", "kvmvapic.bin"), "pc-q35-",
        "qemu-system-x86 (Debian, Ubuntu) or qemu-system-x86-core (Fedora)",
    ),
    # The newest interrupt controller takes more processors than eight, and goes with KVM and without. Signing pointers as the
    # architecture has it takes a third of a boot.
    "aarch64": Machine(
        "virt,gic-version=max", "max,pauth-impdef=on", DESCRIPTION_DEVICE, (), "virt-",
        "qemu-system-arm (Debian, Ubuntu) or qemu-system-aarch64-core (Fedora)",
    ),
    "riscv64": Machine(
        "virt", "max", (), ("opensbi-riscv64-generic-fw_dynamic.bin",), "virt",
        "qemu-system-misc (Debian), qemu-system-riscv (newer ones) or qemu-system-riscv-core (Fedora)",
    ),
}  # fmt: skip


def machine_of(arch: str) -> Machine:
    """Return the machine of an architecture; raises MissingRequirementError where none is known."""
    if arch not in MACHINES:
        raise MissingRequirementError(
            f"no QEMU machine is known for {arch}, which this machine is: there are {', '.join(MACHINES)}; name one with arch="
            if arch == platform.machine()
            else f"no QEMU machine is known for {arch}: there are {', '.join(MACHINES)}"
        )
    return MACHINES[arch]

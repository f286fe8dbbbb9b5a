"""UEFI firmware for Cloud Hypervisor: its own build of EDK II, or Rust Hypervisor Firmware."""

from __future__ import annotations

from pathlib import Path

from pytest_chvm.errors import MissingRequirementError

# As their releases and distributions call them.
NAMES = ("CLOUDHV.fd", "CLOUDHV_EFI.fd", "hypervisor-fw")
PLACES = ("/usr/local/share/cloud-hypervisor", "/usr/share/cloud-hypervisor", "/usr/share/edk2/ovmf", "/usr/share/edk2/x64")


def find_firmware() -> Path:
    """Return the firmware's file; raises MissingRequirementError where none is installed."""
    for place in PLACES:
        for name in NAMES:
            if (file := Path(place, name)).is_file():
                return file
    raise MissingRequirementError(
        f"firmware='uefi' needs firmware for Cloud Hypervisor, and none of {', '.join(NAMES)} is in {', '.join(PLACES)}: put "
        "CLOUDHV.fd there (https://github.com/cloud-hypervisor/edk2/releases), or use --chvm-vmm=qemu"
    )

"""UEFI firmware for QEMU, by the descriptions that distributions install beside it (QEMU's docs/interop/firmware.json)."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from pytest_chvm.drivers.boot import Boot
from pytest_chvm.drivers.qemu.arguments import quoted
from pytest_chvm.drivers.qemu.machines import machine_of
from pytest_chvm.errors import MissingRequirementError

# The first directory that has a description of a name counts; names are in the order of their preference.
PLACES = (Path("/etc/qemu/firmware"), Path("/usr/share/qemu/firmware"), Path("/usr/local/share/qemu/firmware"))
# What is enrolled in it would refuse the boot loaders of many images.
NOT_WANTED = {"secure-boot", "requires-smm"}
INSTALL = "install ovmf (Debian, Ubuntu; for aarch64 qemu-efi-aarch64) or edk2-ovmf (Fedora, Arch; edk2-aarch64)"
VARIABLES_FILE = "firmware-variables.fd"


@dataclass(frozen=True, slots=True)
class Firmware:
    """What is mapped into a machine as flash: the code, and what its variables are at first."""

    code: Path
    variables: Path


def find_firmware(arch: str) -> Firmware:
    """Return UEFI firmware for an architecture; raises MissingRequirementError where none is installed."""
    described: dict[str, Path] = {}
    for place in PLACES:
        for path in place.glob("*.json"):
            described.setdefault(path.name, path)
    for _name, path in sorted(described.items()):
        if (found := _firmware(path, arch)) is not None:
            return found
    raise MissingRequirementError(
        f"firmware='uefi' needs UEFI firmware of {arch} for QEMU, and none is described in {PLACES[1]}: {INSTALL}"
    )


def _firmware(description: Path, arch: str) -> Firmware | None:
    try:
        said = json.loads(description.read_text())
        machines = [machine for target in said["targets"] if target["architecture"] == arch for machine in target["machines"]]
        if "uefi" not in said["interface-types"] or said["mapping"]["device"] != "flash" or NOT_WANTED & set(said["features"]):
            return None
        mapping = said["mapping"]
        found = Firmware(Path(mapping["executable"]["filename"]), Path(mapping["nvram-template"]["filename"]))
        raw = mapping["executable"]["format"] == mapping["nvram-template"]["format"] == "raw"
    except (OSError, ValueError, KeyError, TypeError):
        return None
    fits = raw and any(machine.startswith(machine_of(arch).uefi) for machine in machines)
    return found if fits and found.code.is_file() and found.variables.is_file() else None


def firmware_arguments(boot: Boot, arch: str) -> list[str]:
    """Return the arguments of a machine's flash; what the firmware writes there is the VM's own copy."""
    firmware = find_firmware(arch)
    variables = boot.lease.directory / VARIABLES_FILE
    shutil.copyfile(firmware.variables, variables)
    words = []
    for number, (file, read_only) in enumerate(((firmware.code, "on"), (variables, "off"))):
        node = f"driver=raw,node-name=flash{number},read-only={read_only},file.driver=file,file.filename={quoted(file)}"
        words += ["-blockdev", node, "-machine", f"pflash{number}=flash{number}"]
    return words

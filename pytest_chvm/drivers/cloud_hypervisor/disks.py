"""Cloud Hypervisor's disks: as arguments, as requests of its API, and in the configuration of a saved VM."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytest_chvm.drivers.disks import LAST_SLOT, DiskFile
from pytest_chvm.model import MODULES

# The others are not emulated.
BUSES = frozenset({"virtio", "pmem"})


def arguments(files: Sequence[DiskFile]) -> list[str]:
    """Return the arguments of the disks that a VM is booted with."""
    words = []
    for file in files:
        if file.kind.bus == "pmem":
            words += ["--pmem", f"file={quoted(file.path)}"]
            continue
        more = ",readonly=on" if file.kind.read_only else ""
        more += f",image_type={file.format}{',backing_files=on' if file.format == 'qcow2' else ''}"
        more += f",serial={file.kind.serial}" if file.kind.serial else ""
        more += f",pci_device_id={LAST_SLOT}" if file.kind is MODULES else ""
        words += ["--disk", f"path={quoted(file.path)}{more}"]
    return words


def body(file: DiskFile) -> dict[str, object]:
    """Return what `vm.add-disk` is to be told of a disk."""
    told: dict[str, object] = {"path": os.fspath(file.path), "readonly": file.kind.read_only}
    told |= {"image_type": file.format.capitalize(), "backing_files": file.format == "qcow2"}
    return told | ({"serial": file.kind.serial} if file.kind.serial else {})


def rewrite(config: dict[str, Any], files: Sequence[DiskFile]) -> None:
    """Put the files of a clone's disks into the configuration of the VM that was saved."""
    for bus, key, place in (("virtio", "disks", "path"), ("pmem", "pmem", "file")):
        of_bus = [file for file in files if file.kind.bus == bus]
        for index, file in enumerate(of_bus):
            config[key][index][place] = os.fspath(file.path)


def quoted(path: Path) -> str:
    """Return a path as an option's value: quoted where it has a character that would end it (option_parser/src/lib.rs)."""
    text = os.fspath(path)
    if not re.search(r'[,"\[\]]', text):
        return text
    return '"' + text.replace('"', '""') + '"'

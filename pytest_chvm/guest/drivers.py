"""Which modules of its kernel the built-in guest needs for what only some VMs have."""

from __future__ import annotations

from pytest_chvm.model import VmConfig

OF_BUS: dict[str, tuple[str, ...]] = {
    "virtio": (),
    "nvme": ("nvme",),
    "scsi": ("virtio_scsi", "sd_mod"),
    "nvdimm": ("nfit", "nd_pmem"),
    "pmem": ("virtio_pmem", "nd_pmem"),
}


def modules_for(config: VmConfig) -> tuple[str, ...]:
    """Return the modules that a VM's guest loads beside those of every built-in guest, each once."""
    wanted = [module for disk in config.all_disks for module in OF_BUS[disk.kind.bus]]
    wanted += ["virtio_balloon"] if config.balloon else []
    wanted += ["virtio_iommu"] if config.iommu else []
    wanted += ["kvm_amd", "kvm_intel"] if config.nested else []
    return tuple(dict.fromkeys(wanted))

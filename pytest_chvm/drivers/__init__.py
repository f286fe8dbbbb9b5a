"""VMMs. Each is one module here and one line in `DRIVERS`; nothing else knows one from another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_chvm.errors import InvalidConfigError

if TYPE_CHECKING:
    from pytest_chvm.drivers.base import VmDriver

# In the order in which "auto" tries them: module and class, imported when used.
DRIVERS = {
    "cloud-hypervisor": ("pytest_chvm.drivers.cloud_hypervisor", "CloudHypervisorDriver"),
    "qemu": ("pytest_chvm.drivers.qemu", "QemuDriver"),
}


def make_driver(vmm: str, *, accel: str = "auto", binary: Path | None = None, virtiofsd: Path | None = None) -> VmDriver:
    """Return a driver by its VMM's name; raises InvalidConfigError for a name that there is not."""
    from importlib import import_module

    if vmm not in DRIVERS:
        raise InvalidConfigError(f"vmm={vmm!r}: expected one of auto, {', '.join(DRIVERS)}")
    module, name = DRIVERS[vmm]
    driver: VmDriver = getattr(import_module(module), name)(accel=accel, binary=binary, virtiofsd=virtiofsd)
    return driver


def choose_vmm(*, accel: str = "auto", binary: Path | None = None) -> tuple[str, str]:
    """Return the VMM that "auto" means here, and why, in words.

    The first whose `why_not` finds nothing against it; the last one otherwise, whose own error then says what is missing.
    """
    reasons: list[str] = []
    for vmm in DRIVERS:
        reason = make_driver(vmm, accel=accel, binary=binary).why_not()
        if reason is None:
            return vmm, "; ".join(reasons) or "it and KVM are here"
        reasons.append(f"no {vmm}: {reason}")
    return list(DRIVERS)[-1], "; ".join(reasons)

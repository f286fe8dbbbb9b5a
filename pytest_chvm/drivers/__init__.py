"""VMMs. Each is one module here and one line in `DRIVERS`; nothing else knows one from another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_chvm.errors import InvalidConfigError, MissingRequirementError

if TYPE_CHECKING:
    from pytest_chvm.drivers.base import VmDriver
    from pytest_chvm.host.host import Host

# In the order in which "auto" tries them: module and class, imported when used.
DRIVERS = {
    "cloud-hypervisor": ("pytest_chvm.drivers.cloud_hypervisor.driver", "CloudHypervisorDriver"),
    "qemu": ("pytest_chvm.drivers.qemu.driver", "QemuDriver"),
}


def make_driver(
    vmm: str, *, accel: str = "auto", binary: Path | None = None, virtiofsd: Path | None = None, host: Host | None = None
) -> VmDriver:
    """Return a driver by its VMM's name, for VMs of `host` (None: the default one).

    Raises InvalidConfigError for a name that there is not.
    """
    from importlib import import_module

    if vmm not in DRIVERS:
        raise InvalidConfigError(f"vmm={vmm!r}: expected one of auto, {', '.join(DRIVERS)}")
    module, name = DRIVERS[vmm]
    driver: VmDriver = getattr(import_module(module), name)(accel=accel, binary=binary, virtiofsd=virtiofsd, host=host)
    return driver


def choose_vmm(*, accel: str = "auto", binary: Path | None = None) -> tuple[str, str]:
    """Return the VMM that "auto" means here, and why, in words.

    The one that `binary` says that it is. Else the first whose `why_not` finds nothing against it; the last one otherwise, whose
    own error then says what is missing.
    """
    if binary is not None and (named := _vmm_of(binary)) is not None:
        return named
    reasons: list[str] = []
    for vmm in DRIVERS:
        try:
            reason = make_driver(vmm, accel=accel, binary=binary).why_not()
        except InvalidConfigError as error:
            # It has no such accelerator.
            reason = str(error)
        if reason is None:
            return vmm, "; ".join(reasons) or "it and KVM are here"
        reasons.append(f"no {vmm}: {reason}")
    return list(DRIVERS)[-1], "; ".join(reasons)


def _vmm_of(binary: Path) -> tuple[str, str] | None:
    """Return which VMM an executable is by its `--version`, and that in words; None where it does not say so."""
    from pytest_chvm.host import binaries, versions

    try:
        found = binaries.find_binary("the VMM", (), "", binary)
    except MissingRequirementError:
        # Whoever needs it says so.
        return None
    program = versions.program_of(found)
    return (program, f"{binary} is {found.version}") if program in DRIVERS else None

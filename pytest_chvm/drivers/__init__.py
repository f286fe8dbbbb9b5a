"""VMMs. Each is a folder here, and its name is one of `base/choices.py`; nothing else knows one from another."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from pytest_chvm.base.choices import Vmm
from pytest_chvm.errors import InvalidConfigError, MissingRequirementError, UnsupportedError

if TYPE_CHECKING:
    from pytest_chvm.drivers.base import VmDriver
    from pytest_chvm.host.host import Host

# In the order in which "auto" tries them.
VMMS: list[str] = [vmm for vmm in get_args(Vmm) if vmm != "auto"]


def make_driver(
    vmm: str,
    *,
    accel: str = "auto",
    binary: Path | None = None,
    virtiofsd: Path | None = None,
    host: Host | None = None,
    arch: str | None = None,
) -> VmDriver:
    """Return a driver by its VMM's name, for VMs of `host` (None: the default one) and of an architecture (None: this machine's).

    Raises InvalidConfigError for an unknown name, UnsupportedError for an architecture that the VMM does not run.
    """
    from importlib import import_module

    if vmm not in VMMS:
        raise InvalidConfigError(f"vmm={vmm!r}: expected one of auto, {', '.join(VMMS)}")
    module = import_module(f"{__name__}.{vmm.replace('-', '_')}.driver")
    kind, more = module.DRIVER, {}
    if arch is not None and arch != platform.machine():
        if not kind.abilities.other_architectures:
            raise UnsupportedError(
                f"arch={arch!r}: {vmm} runs guests of this machine's architecture only, {platform.machine()}: leave out arch, "
                "or do not ask for this VMM (--chvm-vmm)"
            )
        more = {"arch": arch}
    driver: VmDriver = kind(accel=accel, binary=binary, virtiofsd=virtiofsd, host=host, **more)
    return driver


def choose_vmm(*, accel: str = "auto", binary: Path | None = None, arch: str | None = None) -> tuple[str, str]:
    """Return the VMM that "auto" means here, and why, in words.

    Where `binary` is given, the VMM that its `--version` names. Otherwise the first VMM whose `why_not` has no objection, or the
    last one, whose error then says what is missing.
    """
    if binary is not None and (named := _vmm_of(binary)) is not None:
        return named
    reasons: list[str] = []
    for vmm in VMMS:
        try:
            reason = make_driver(vmm, accel=accel, binary=binary, arch=arch).why_not()
        except (InvalidConfigError, UnsupportedError) as error:
            # This VMM does not have that accelerator, or architecture.
            reason = str(error)
        if reason is None:
            return vmm, "; ".join(reasons) or "it and KVM are here"
        reasons.append(f"no {vmm}: {reason}")
    return VMMS[-1], "; ".join(reasons)


def _vmm_of(binary: Path) -> tuple[str, str] | None:
    """Return which VMM an executable is by its `--version`, and that in words; None where it does not say so."""
    from pytest_chvm.host import binaries, versions

    try:
        found = binaries.find_binary("the VMM", (), "", binary)
    except MissingRequirementError:
        # The driver, which needs it, has the better error.
        return None
    program = versions.program_of(found)
    return (program, f"{binary} is {found.version}") if program in VMMS else None

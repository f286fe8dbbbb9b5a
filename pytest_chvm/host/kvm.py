"""Whether this machine's KVM runs guests, which is more than whether /dev/kvm opens."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path

# Made by the first process of the lab (guest/lab_init.sh).
LAB_FILE = "/run/chvm-lab"


def is_in_lab() -> bool:
    """Tell whether this machine is the lab, whose KVM runs on an emulated processor."""
    return os.path.exists(LAB_FILE)


@lru_cache(maxsize=1)
def why_no_kvm() -> str | None:
    """Return why KVM cannot be used here, or None where it can.

    A KVM without the processor's help (PVM, and nested set-ups that offer the device only) opens and makes VMs, in which
    no ordinary kernel ever gets anywhere: so the processor's own flag must be there too (x86).
    """
    if not os.path.exists("/dev/kvm"):
        return "/dev/kvm is not there"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm may not be opened by you: join the group kvm"
    if platform.machine() != "x86_64":
        return None
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    if not {"vmx", "svm"} & set(flags.split()):
        return "/dev/kvm opens, but the CPU has neither vmx nor svm"
    return None


def require_nested_kvm(vm_name: str) -> None:
    """Raise MissingRequirementError where guests of this machine's KVM can have no guests of their own."""
    from pytest_chvm.errors import MissingRequirementError

    switches = [Path(f"/sys/module/{module}/parameters/nested") for module in ("kvm_intel", "kvm_amd")]
    if not any(switch.exists() and switch.read_text().strip() in ("Y", "1") for switch in switches):
        raise MissingRequirementError(
            f"VM {vm_name!r}: nested=True, and this machine's KVM is without it: load kvm_intel or kvm_amd with nested=1, or use "
            "accel='tcg'",
            vm_name=vm_name,
        )

"""What some options are one of, said once: for the options themselves, for type checkers, and for what acts on them."""

from __future__ import annotations

from typing import Literal

# In the order in which "auto" tries them. Each but that has a folder below `drivers/`, its name with "_" for "-".
Vmm = Literal["auto", "cloud-hypervisor", "qemu"]
Accel = Literal["auto", "kvm", "tcg"]
NetworkMode = Literal["auto", "tap", "user", "none"]
BootWay = Literal["auto", "cold", "clone"]
Arch = Literal["x86_64", "aarch64", "riscv64"]

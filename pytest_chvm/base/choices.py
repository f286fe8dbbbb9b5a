"""What some options are one of, said once: for the options themselves, for type checkers, and for what acts on them."""

from __future__ import annotations

from typing import Literal

# In the order in which "auto" tries them. Each but that has a folder below `drivers/`, its name with "_" for "-".
Vmm = Literal["auto", "cloud-hypervisor", "qemu"]
Accel = Literal["auto", "kvm", "tcg"]
NetworkMode = Literal["auto", "tap", "user", "none"]
BootWay = Literal["auto", "cold", "clone"]
Arch = Literal["x86_64", "aarch64", "riscv64"]

# Words for kernels that have no path: the one that the host runs, and those of a distribution's packages, "debian:6.1". Among
# paths, which are absolute, such a word is a relative one.
HOST_KERNEL = "host"
KERNEL_PACKAGES = "debian"


def is_kernel_word(text: str) -> bool:
    """Tell whether a text is a word for a kernel, and no path; a file of such a name is `./host`."""
    return text == HOST_KERNEL or text.startswith(f"{KERNEL_PACKAGES}:")


def split_kernels(text: str) -> list[str]:
    """Return the kernels of a text that has several, separated as in PATH; the colon of `debian:6.1` separates nothing."""
    names: list[str] = []
    for part in text.split(":"):
        if names and names[-1] == KERNEL_PACKAGES:
            names[-1] += f":{part}"
        else:
            names.append(part)
    return [name for name in names if name]

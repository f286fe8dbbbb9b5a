"""Which VMs can be clones of a template, what the template is made of, and how a clone is made a machine of its own."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from pytest_chvm.drivers.base import VmDriver
from pytest_chvm.guest import renew
from pytest_chvm.guest.shell import shell_script
from pytest_chvm.model import Network, Tap, VmConfig
from pytest_chvm.snapshots import content_key


def why_no_clone(config: VmConfig, *, built_in_guest: bool) -> str | None:
    """Return why a VM has to be booted, or None where it can be a clone of one that was."""
    if not built_in_guest:
        return "it has an initramfs or root disk of its own, in which nothing renews a clone's addresses, clock and random pool"
    if config.seed_iso is not None:
        return "it has a seed_iso"
    if config.channels:
        return "it has channels"
    if not all(isinstance(n, Tap) or (isinstance(n, Network) and n.bridge) for n in config.networks or ()):
        return "it has a network that is not a TAP's"
    return None


def why_no_snapshot(config: VmConfig, plugged: Iterable[str], *, built_in_guest: bool, is_clone: bool) -> str | None:
    """Return why a running VM cannot be saved for clones to start from, or None where it can."""
    why = why_no_clone(config, built_in_guest=built_in_guest)
    if why is not None:
        return why
    if config.data_disk is not None:
        return "it has a data_disk, which would be its clones' too"
    if config.shared_dirs and not is_clone:
        return "its shared dirs cannot be unplugged: start it with boot='clone' or 'auto'"
    if names := ", ".join(plugged):
        return f"{names} was plugged in: remove it first"
    return None


def template_config(config: VmConfig) -> VmConfig:
    """Return what is booted for the template of a VM: the VM without what comes fresh to each clone."""
    networks = None if config.networks is None else [Tap() for _ in config.networks]
    return clone_config(config).replace(networks=networks, data_disk=None, shared_dirs=(), netns=None)


def clone_config(config: VmConfig) -> VmConfig:
    """Return what a clone is made of: disks and shared dirs are plugged in, and the template needs places for them too."""
    return config.replace(hotplug=config.hotplug or config.data_disk is not None or bool(config.shared_dirs))


def made_of(config: VmConfig, driver: VmDriver, network_mode: str, cache: Path) -> dict[str, object]:
    """Return all that a template depends on, by name, for its key; `config` is a template's."""
    return {
        "vmm": driver.snapshot_key(),
        "host": [platform.release(), _processor()],
        "kernel": content_key(config.kernel, cache) if config.kernel else None,
        "initramfs": content_key(config.initramfs, cache) if config.initramfs else None,
        "cmdline": config.cmdline,
        "processors": [config.cpus, config.max_cpus, config.cpu_model],
        "memory_mb": [config.memory_mb, config.max_memory_mb],
        "networks": [network_mode] if config.networks is None else ["tap"] * len(config.networks),
        "hotplug": config.hotplug,
        # A template's console shell runs it already.
        "shell": hashlib.sha256(shell_script()).hexdigest(),
    }


@lru_cache(maxsize=1)
def _processor() -> str:
    # A guest sees the host's processor with KVM, and a microcode update may take features away.
    lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "microcode")))


def renewal(words: Sequence[str], *, stale_nics: int = 0) -> str:
    """Return the shell line that makes a clone of the built-in guest a machine of its own, which then says that it is ready.

    `words` are those of the kernel command line. `stale_nics`: how many NICs have the snapshot's addresses.
    """
    flush = "".join(f"ip addr flush dev eth{index};" for index in range(stale_nics))
    message = renew.message(time.time_ns(), os.urandom(renew.SEED_SIZE))
    octal = "".join(f"\\{byte:03o}" for byte in message)
    # By a file, since a pipe takes another process, and no longer than it has to be there.
    renewed = f"printf '{octal}' >$chvm_tmp/seed && /lib/chvm/renew <$chvm_tmp/seed && : >$chvm_tmp/seed"
    # The pool first: nothing may be drawn from it before, and a clone whose pool is the template's must not be ready.
    return f"{renewed} && {{ {flush}chvm_configure {shlex.join(words)}; }}"

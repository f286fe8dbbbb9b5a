"""What Cloud Hypervisor restores a VM from: a snapshot's configuration, rewritten for another VM.

A snapshot is `config.json`, `state.json` and, unless the memory is a shared file, `memory-ranges`
(docs/snapshot_restore.md). What the VM has of the host is in the first, which is plain JSON (vmm/src/vm_config.rs).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytest_chvm.drivers.boot import Boot
from pytest_chvm.drivers.cloud_hypervisor import disks as ch_disks
from pytest_chvm.drivers.cloud_hypervisor import landlock as ch_landlock
from pytest_chvm.drivers.disks import disk_files
from pytest_chvm.drivers.taps import AttachedTap
from pytest_chvm.errors import HypervisorError

CONFIG, STATE, MEMORY = "config.json", "state.json", "memory-ranges"
# The TSC is saved and set a little after the clock. A clone's kernel compares the two twice a second, and would find its TSC
# unstable; what is more than a second apart it does not compare (WATCHDOG_INTERVAL_MAX_NS, kernel/time/clocksource.c).
STEP_NS = 2 * 10**9


def make_source(boot: Boot, snapshot: Path, source: Path, taps: Sequence[AttachedTap]) -> None:
    """Make the directory that a VM is restored from: the snapshot's files, and a configuration with this VM's own devices.

    Raises HypervisorError where the snapshot cannot be read or has other NICs than this VM.
    """
    try:
        config = json.loads((snapshot / CONFIG).read_text())
        source.mkdir(mode=0o700)
        for name in (STATE, MEMORY):
            if (snapshot / name).exists():
                (source / name).symlink_to(snapshot / name)
        _rewrite(config, boot, taps)
        (source / CONFIG).write_text(json.dumps(config))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HypervisorError(f"the snapshot {str(snapshot)!r} cannot be restored: {error!r}") from error


def stop_clock(snapshot: Path) -> None:
    """Have the clock of a saved VM go on from where it was: its clones would else find that all the time since has passed.

    The clock is a `struct kvm_clock_data` (Documentation/virt/kvm/api.rst, KVM_SET_CLOCK). Its flags, from byte 8 on, have KVM add
    the time since. A state of another form is left as it is.
    """
    with suppress(ValueError, KeyError, TypeError):
        saved = json.loads((snapshot / STATE).read_text())
        machine = json.loads(saved["snapshot_data"]["state"])
        clock = bytes(machine["clock"]["Kvm"])
        time_ns = int.from_bytes(clock[:8], "little") + STEP_NS
        machine["clock"]["Kvm"] = [*time_ns.to_bytes(8, "little"), *bytes(4), *clock[12:]]
        saved["snapshot_data"]["state"] = json.dumps(machine)
        (snapshot / STATE).write_text(json.dumps(saved))


def name_memory(source: Path, file: Path) -> None:
    """Put the file that the VMM has inherited into the configuration it is about to read.

    On a command line the keeper does that, which alone knows its descriptor's number.
    """
    config = json.loads((source / CONFIG).read_text())
    config["memory"]["zones"][0]["file"] = f"/proc/self/fd/{file.name}"
    (source / CONFIG).write_text(json.dumps(config))


def _rewrite(config: dict[str, Any], boot: Boot, taps: Sequence[AttachedTap]) -> None:
    nics = config.get("net") or []
    if len(nics) != len(taps):
        raise HypervisorError(f"the snapshot has {len(nics)} NICs and the VM {len(taps)}")
    ch_disks.rewrite(config, disk_files(boot))
    for nic, tap in zip(nics, taps, strict=True):
        nic.update(tap=tap.name, mac=tap.mac, host_mac=None, fds=None)
    # None where the VM was not booted to be a template: its memory is in the snapshot then.
    for zone in config["memory"].get("zones") or []:
        file, shared = (boot.memory.path, boot.memory.shared) if boot.memory else (None, boot.config.hotplug)
        zone.update(file=file, shared=shared)
    # It would truncate a file, and the log begins with the boot of the saved VM.
    config["serial"].update(mode="Tty", file=None)
    # It makes a new PTY.
    config["console"]["file"] = None
    # The socket is in the run directory of the VM that was saved.
    config["vsock"] = None
    config["payload"]["cmdline"] = boot.config.cmdline
    config["landlock_enable"] = ch_landlock.is_confined(boot)
    config["landlock_rules"] = [{"path": os.fspath(path), "access": access} for path, access in ch_landlock.rules(boot, list(taps))]

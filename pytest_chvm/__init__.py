"""A real virtual machine for a test, the way `tmp_path` is a directory.

The names below are the public interface; each is imported at its first use, because this package is loaded by every
pytest run of everyone who has it installed.
"""

from __future__ import annotations

# While nobody has replaced anything yet.
from pytest_chvm.base import untouched as untouched

__version__ = "0.1.0"

_HOMES = {
    "launch": "machine.launcher",
    "Vm": "machine.vm",
    "VmFactory": "plugin.factory",
    "Ktap": "plugin.ktap",
    **dict.fromkeys(("KtapReport", "KtapResult"), "guest.ktap"),
    "KernelConfig": "guest.kernels.config",
    "GuestProcess": "machine.process",
    "GuestOutput": "machine.process",
    "Snapshot": "machine.vm",
    "Device": "machine.device",
    "GuestKernel": "machine.kernel",
    **dict.fromkeys(("KernelMessage", "Splat"), "model.kernel_log"),
    **dict.fromkeys(("ConfigArguments", "VmArguments"), "model.arguments"),
    "Settings": "settings",
    "VmDriver": "drivers.base",
    "CloudHypervisorDriver": "drivers.cloud_hypervisor.driver",
    "QemuDriver": "drivers.qemu.driver",
    **dict.fromkeys(
        (
            "CommandResult",
            "Cpus",
            "Disk",
            "HostRoot",
            "Network",
            "ProcessIdentity",
            "SharedDir",
            "SocketPairFd",
            "Tap",
            "UserNetwork",
            "VmConfig",
            "VmHandle",
            "VmState",
            "VmStatus",
        ),
        "model",
    ),
    **dict.fromkeys(
        (
            "BootFailedError",
            "CommandTimeoutError",
            "EarlyGuestPanicError",
            "GuestCommandError",
            "GuestError",
            "GuestOopsError",
            "GuestPanicError",
            "GuestRebootError",
            "GuestShutdownError",
            "GuestSplatError",
            "HostError",
            "HypervisorError",
            "InvalidConfigError",
            "MissingRequirementError",
            "StateFailedError",
            "StopFailedError",
            "UnsupportedError",
            "VmError",
            "VmIOError",
            "VmNotFoundError",
        ),
        "errors",
    ),
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value

"""A real virtual machine for a test, the way `tmp_path` is a directory.

The names below are the public interface; each is imported at its first use, because this package is loaded by every
pytest run of everyone who has it installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "launch": "launcher",
    "Vm": "vm",
    "Settings": "settings",
    "VmDriver": "drivers.base",
    "CloudHypervisorDriver": "drivers.cloud_hypervisor",
    "QemuDriver": "drivers.qemu",
    **dict.fromkeys(
        (
            "CommandResult",
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
            "GuestCommandError",
            "GuestPanicError",
            "GuestRebootError",
            "GuestShutdownError",
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

if TYPE_CHECKING:
    from pytest_chvm.drivers.base import VmDriver as VmDriver
    from pytest_chvm.drivers.cloud_hypervisor import CloudHypervisorDriver as CloudHypervisorDriver
    from pytest_chvm.drivers.qemu import QemuDriver as QemuDriver
    from pytest_chvm.errors import BootFailedError as BootFailedError
    from pytest_chvm.errors import CommandTimeoutError as CommandTimeoutError
    from pytest_chvm.errors import GuestCommandError as GuestCommandError
    from pytest_chvm.errors import GuestPanicError as GuestPanicError
    from pytest_chvm.errors import GuestRebootError as GuestRebootError
    from pytest_chvm.errors import GuestShutdownError as GuestShutdownError
    from pytest_chvm.errors import HypervisorError as HypervisorError
    from pytest_chvm.errors import InvalidConfigError as InvalidConfigError
    from pytest_chvm.errors import MissingRequirementError as MissingRequirementError
    from pytest_chvm.errors import StateFailedError as StateFailedError
    from pytest_chvm.errors import StopFailedError as StopFailedError
    from pytest_chvm.errors import UnsupportedError as UnsupportedError
    from pytest_chvm.errors import VmError as VmError
    from pytest_chvm.errors import VmIOError as VmIOError
    from pytest_chvm.errors import VmNotFoundError as VmNotFoundError
    from pytest_chvm.launcher import launch as launch
    from pytest_chvm.model import CommandResult as CommandResult
    from pytest_chvm.model import Network as Network
    from pytest_chvm.model import ProcessIdentity as ProcessIdentity
    from pytest_chvm.model import SharedDir as SharedDir
    from pytest_chvm.model import SocketPairFd as SocketPairFd
    from pytest_chvm.model import Tap as Tap
    from pytest_chvm.model import UserNetwork as UserNetwork
    from pytest_chvm.model import VmConfig as VmConfig
    from pytest_chvm.model import VmHandle as VmHandle
    from pytest_chvm.model import VmState as VmState
    from pytest_chvm.model import VmStatus as VmStatus
    from pytest_chvm.settings import Settings as Settings
    from pytest_chvm.vm import Vm as Vm

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value

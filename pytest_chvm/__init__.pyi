"""The public names, for type checkers: at run time each is imported at its first use."""

from pytest_chvm.drivers.base import VmDriver as VmDriver
from pytest_chvm.drivers.cloud_hypervisor.driver import CloudHypervisorDriver as CloudHypervisorDriver
from pytest_chvm.drivers.qemu.driver import QemuDriver as QemuDriver
from pytest_chvm.errors import BootFailedError as BootFailedError
from pytest_chvm.errors import CommandTimeoutError as CommandTimeoutError
from pytest_chvm.errors import EarlyGuestPanicError as EarlyGuestPanicError
from pytest_chvm.errors import GuestCommandError as GuestCommandError
from pytest_chvm.errors import GuestError as GuestError
from pytest_chvm.errors import GuestOopsError as GuestOopsError
from pytest_chvm.errors import GuestPanicError as GuestPanicError
from pytest_chvm.errors import GuestRebootError as GuestRebootError
from pytest_chvm.errors import GuestShutdownError as GuestShutdownError
from pytest_chvm.errors import HostError as HostError
from pytest_chvm.errors import HypervisorError as HypervisorError
from pytest_chvm.errors import InvalidConfigError as InvalidConfigError
from pytest_chvm.errors import MissingRequirementError as MissingRequirementError
from pytest_chvm.errors import StateFailedError as StateFailedError
from pytest_chvm.errors import StopFailedError as StopFailedError
from pytest_chvm.errors import UnsupportedError as UnsupportedError
from pytest_chvm.errors import VmError as VmError
from pytest_chvm.errors import VmIOError as VmIOError
from pytest_chvm.errors import VmNotFoundError as VmNotFoundError
from pytest_chvm.machine.device import Device as Device
from pytest_chvm.machine.launcher import launch as launch
from pytest_chvm.machine.process import GuestOutput as GuestOutput
from pytest_chvm.machine.process import GuestProcess as GuestProcess
from pytest_chvm.machine.vm import Snapshot as Snapshot
from pytest_chvm.machine.vm import Vm as Vm
from pytest_chvm.model import CommandResult as CommandResult
from pytest_chvm.model import HostRoot as HostRoot
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
from pytest_chvm.model.arguments import ConfigArguments as ConfigArguments
from pytest_chvm.model.arguments import VmArguments as VmArguments
from pytest_chvm.plugin.factory import VmFactory as VmFactory
from pytest_chvm.settings import Settings as Settings

__version__: str

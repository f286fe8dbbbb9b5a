"""What a VM is, as frozen data, and the validation of it: everything that can be said without looking at the host.

Nothing in this room starts, opens or writes anything.
"""

from pytest_chvm.model.architecture import ARCHITECTURES as ARCHITECTURES
from pytest_chvm.model.architecture import Architecture as Architecture
from pytest_chvm.model.architecture import architecture as architecture
from pytest_chvm.model.config import CHANNEL_PATTERN as CHANNEL_PATTERN
from pytest_chvm.model.config import CONFIG_FIELDS as CONFIG_FIELDS
from pytest_chvm.model.config import CPU_MODEL_PATTERN as CPU_MODEL_PATTERN
from pytest_chvm.model.config import LAUNCH_FIELDS as LAUNCH_FIELDS
from pytest_chvm.model.config import VmConfig as VmConfig
from pytest_chvm.model.config import check_argument_names as check_argument_names
from pytest_chvm.model.disks import DATA as DATA
from pytest_chvm.model.disks import DISK_KINDS as DISK_KINDS
from pytest_chvm.model.disks import MEMORY_BUSES as MEMORY_BUSES
from pytest_chvm.model.disks import MEMORY_STEP_MB as MEMORY_STEP_MB
from pytest_chvm.model.disks import MODULES as MODULES
from pytest_chvm.model.disks import ROOT as ROOT
from pytest_chvm.model.disks import SEED as SEED
from pytest_chvm.model.disks import AnyDisk as AnyDisk
from pytest_chvm.model.disks import Disk as Disk
from pytest_chvm.model.disks import DiskKind as DiskKind
from pytest_chvm.model.disks import EmptyDisk as EmptyDisk
from pytest_chvm.model.disks import VmDisk as VmDisk
from pytest_chvm.model.disks import names_in_guest as names_in_guest
from pytest_chvm.model.disks import plugged_into_clones as plugged_into_clones
from pytest_chvm.model.handle import ProcessIdentity as ProcessIdentity
from pytest_chvm.model.handle import VmHandle as VmHandle
from pytest_chvm.model.handle import VmState as VmState
from pytest_chvm.model.handle import VmStatus as VmStatus
from pytest_chvm.model.host_root import HOST_ROOT_TAG as HOST_ROOT_TAG
from pytest_chvm.model.host_root import HostRoot as HostRoot
from pytest_chvm.model.host_root import Resident as Resident
from pytest_chvm.model.machine import Cpus as Cpus
from pytest_chvm.model.networks import INTERFACE_PATTERN as INTERFACE_PATTERN
from pytest_chvm.model.networks import Attachment as Attachment
from pytest_chvm.model.networks import Network as Network
from pytest_chvm.model.networks import NicAddress as NicAddress
from pytest_chvm.model.networks import SocketPairFd as SocketPairFd
from pytest_chvm.model.networks import Tap as Tap
from pytest_chvm.model.networks import UserNetwork as UserNetwork
from pytest_chvm.model.results import CommandResult as CommandResult
from pytest_chvm.model.shares import CACHE_POLICIES as CACHE_POLICIES
from pytest_chvm.model.shares import TAG_PATTERN as TAG_PATTERN
from pytest_chvm.model.shares import ServedShare as ServedShare
from pytest_chvm.model.shares import SharedDir as SharedDir
from pytest_chvm.model.values import MAC_PATTERN as MAC_PATTERN
from pytest_chvm.model.values import NAME_PATTERN as NAME_PATTERN
from pytest_chvm.model.values import StrPath as StrPath
from pytest_chvm.model.values import as_path as as_path
from pytest_chvm.model.values import check_port as check_port
from pytest_chvm.model.values import checked_mac as checked_mac
from pytest_chvm.model.values import mac_for as mac_for

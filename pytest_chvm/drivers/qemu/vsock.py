"""vsock with QEMU: the host's kernel carries it (vhost_vsock), and lends each VM a CID as long as a descriptor is open."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

from pytest_chvm.base.untouched import Socket, random_below
from pytest_chvm.errors import HostError, UnsupportedError, VmIOError

NODE = "/dev/vhost-vsock"
# include/uapi/linux/vhost.h
VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60
# Those below are the hypervisor's, this machine's and the host's; the last one is anybody's (vsock(7)).
FIRST_CID, LAST_CID = 3, 0xFFFFFFFE
ATTEMPTS = 100
CONNECT_TIMEOUT_S = 10.0
DEVICE = "vsock"


def why_no_vsock() -> str | None:
    """Return why a QEMU VM has no vsock on this machine, or None where it has."""
    if not os.path.exists(NODE):
        return f"{NODE} is not there: run 'modprobe vhost_vsock'"
    if not os.access(NODE, os.R_OK | os.W_OK):
        return f"{NODE} may not be opened by you: join the group kvm"
    try:
        os.close(os.open(NODE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        # The device node exists, but the kernel has no such driver.
        return f"{NODE} cannot be opened ({error.strerror}): run 'modprobe vhost_vsock'"
    return None


def open_device(vm_name: str) -> tuple[int, int] | None:
    """Return a descriptor for QEMU and the CID that goes with it, which the kernel gives to nobody else while it is open.

    None where this machine has no vsock for VMs.
    """
    try:
        fd = os.open(NODE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        # The device node exists, but the kernel has no such driver.
        return None
    for _attempt in range(ATTEMPTS):
        cid = FIRST_CID + random_below(LAST_CID - FIRST_CID + 1)
        try:
            fcntl.ioctl(fd, VHOST_VSOCK_SET_GUEST_CID, struct.pack("=Q", cid))
            return fd, cid
        except OSError:
            # Another VM has this CID.
            continue
    os.close(fd)
    raise HostError(f"VM {vm_name!r}: {NODE} gave it none of {ATTEMPTS} CIDs", vm_name=vm_name)


def connect(vm_name: str, cid: int, port: int) -> socket.socket:
    """Return a stream to a vsock port of the guest's; raises VmIOError where nothing listens there."""
    peer = Socket(socket.AF_VSOCK)
    peer.settimeout(CONNECT_TIMEOUT_S)
    try:
        peer.connect((cid, port))
    except OSError as error:
        peer.close()
        raise VmIOError(f"VM {vm_name!r}: nothing in the guest listens at vsock port {port}: {error}", vm_name=vm_name) from error
    peer.settimeout(None)
    return peer


def listen(vm_name: str, cid: int, port: int) -> socket.socket:
    """Return a listener at a vsock port of the host's, for this guest; raises VmIOError where somebody has the port."""
    listener = _Listener(cid)
    try:
        listener.bind((socket.VMADDR_CID_HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise VmIOError(
            f"VM {vm_name!r}: vsock port {port} of the host cannot be had ({error.strerror}): with QEMU all VMs of the machine "
            "share its ports; take another",
            vm_name=vm_name,
        ) from error
    return listener


class _Listener(Socket):
    """Accepts streams of one guest; those of others, who can reach the port too, are closed."""

    def __init__(self, cid: int) -> None:
        super().__init__(socket.AF_VSOCK)
        self._cid = cid

    def accept(self) -> tuple[Socket, tuple[int, int]]:
        while True:
            stream, address = super().accept()
            if address[0] == self._cid:
                return stream, address
            stream.close()


def refuse(vm_name: str) -> UnsupportedError:
    """Return the error for a VM that was booted without vsock."""
    return UnsupportedError(
        f"VM {vm_name!r} has no vsock: {why_no_vsock() or f'{NODE} was not there when it was booted'}; or use "
        "--chvm-vmm=cloud-hypervisor, which needs nothing of the host's",
        vm_name=vm_name,
    )

"""Streams between host and guest without a network."""

import os
import shutil
import subprocess

import pytest

from pytest_chvm import UnsupportedError, VmIOError
from pytest_chvm.drivers.qemu.vsock import why_no_vsock

# With QEMU the ports of the host are all runs' together.
HOST_PORT = (1 << 16) + os.getpid()

PEER = r"""
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
/* "listen PORT": echo one line. "connect PORT": send one line to the host. */
int main(int argc, char **argv) {
    struct sockaddr_vm at = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY};
    char line[64];
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    sscanf(argv[2], "%u", &at.svm_port);
    if (!strcmp(argv[1], "connect")) {
        at.svm_cid = VMADDR_CID_HOST;
        if (connect(fd, (void *)&at, sizeof at)) return 1;
        return write(fd, "from the guest\n", 15) != 15;
    }
    if (bind(fd, (void *)&at, sizeof at) || listen(fd, 1)) { perror("bind, listen"); return 2; }
    puts("listening"); fflush(stdout);
    fd = accept(fd, 0, 0);
    ssize_t n = read(fd, line, sizeof line);
    return write(fd, line, n) != n;
}
"""


@pytest.fixture(scope="session")
def peer(tmp_path_factory):
    """A program for the guest that speaks vsock; BusyBox has none."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: install gcc and libc6-dev")
    source = tmp_path_factory.mktemp("vsock") / "peer.c"
    source.write_text(PEER)
    subprocess.run([compiler, "-static", "-O", "-o", source.with_suffix(""), source], check=True)
    return source.with_suffix("")


# Its first line says that it listens, or why not.
LISTEN = (
    'rm -f /tmp/said; mkfifo /tmp/said; /tmp/peer listen 5000 >/tmp/said 2>&1 & read -r line </tmp/said; [ "$line" = listening ]'
)


@pytest.mark.in_lab
def test_streams_open_from_either_side_and_each_vm_has_its_own(boot, vmm, peer):
    one, two = boot(network="none", name="one", wait=False), boot(network="none", name="two", wait=False)
    for vm in (one, two):
        vm.wait_ready().put(peer, "/tmp/peer")
        with pytest.raises(VmIOError, match="5000"):
            vm.vsock(5000)
        vm.check_output(LISTEN)
    for vm, said in ((one, b"to the one"), (two, b"to the other")):
        with vm.vsock(5000) as stream:
            stream.settimeout(20)
            stream.sendall(said)
            assert stream.recv(64) == said
    with one.listen_vsock(HOST_PORT) as listener:
        listener.settimeout(20)
        one.check_output(f"/tmp/peer connect {HOST_PORT}")
        stream, _ = listener.accept()
        with stream:
            stream.settimeout(20)
            assert stream.recv(64) == b"from the guest\n"
        # With QEMU the port is the machine's, and another guest gets no further than this.
        two.run(f"/tmp/peer connect {HOST_PORT}")
        listener.settimeout(1)
        with pytest.raises(TimeoutError):
            listener.accept()
        if vmm == "qemu":
            with pytest.raises(VmIOError, match="take another"):
                two.listen_vsock(HOST_PORT)


@pytest.mark.skipif(why_no_vsock() is None, reason="this machine has vsock for QEMU")
def test_where_the_host_has_no_vsock_for_qemu_that_is_said(chvm_vm):
    vm = chvm_vm(vmm="qemu", network="none")
    for use in (vm.vsock, vm.listen_vsock):
        with pytest.raises(UnsupportedError, match="/dev/vhost-vsock"):
            use(5000)

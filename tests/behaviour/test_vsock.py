"""Streams between host and guest without a network."""

import shutil
import subprocess

import pytest

from pytest_chvm import UnsupportedError, VmIOError

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
    if (bind(fd, (void *)&at, sizeof at) || listen(fd, 1)) return 2;
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


def test_streams_open_from_either_side(boot, vmm, peer):
    vm = boot(network="none")
    if vmm == "qemu":
        with pytest.raises(UnsupportedError, match="vsock"):
            vm.vsock(5000)
        return
    with pytest.raises(VmIOError, match="5000"):
        vm.vsock(5000)
    vm.put(peer, "/tmp/peer")
    vm.check_output("/tmp/peer listen 5000 >/tmp/said & until grep -q listening /tmp/said; do usleep 50000; done")
    with vm.vsock(5000) as stream:
        stream.settimeout(20)
        stream.sendall(b"from the host\n")
        assert stream.recv(64) == b"from the host\n"
    with vm.listen_vsock(5001) as listener:
        listener.settimeout(20)
        vm.check_output("/tmp/peer connect 5001")
        stream, _ = listener.accept()
        with stream:
            stream.settimeout(20)
            assert stream.recv(64) == b"from the guest\n"

"""What a guest on the user-mode network reaches of the host, and that it can be told to reach nothing."""

from __future__ import annotations

import socket
import threading
import urllib.request

import pytest

from pytest_chvm import InvalidConfigError, Tap, UnsupportedError, VmConfig


@pytest.fixture
def service():
    """The port of a service on the host's loopback, which says "secret"."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            while True:
                try:
                    client, _peer = listener.accept()
                except OSError:
                    return
                with client:
                    client.sendall(b"secret\n")

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("outbound", [True, False])
def test_a_guest_without_outbound_reaches_nothing_and_is_reached(chvm_vm, service, outbound):
    more = {"network": "user"} if outbound else {"outbound": False}
    vm = chvm_vm(vmm="qemu", **more)
    gateway = vm.config.networks[0].host
    said = vm.run(f"nc -w 3 {gateway} {service} </dev/null", timeout=20)
    assert ("secret" in said.stdout) == outbound
    vm.check_output("mkdir /tmp/www && echo hello >/tmp/www/index.html && httpd -p 8080 -h /tmp/www")
    host, port = vm.address(8080)
    with urllib.request.urlopen(f"http://{host}:{port}/", timeout=20) as answer:
        assert answer.read() == b"hello\n"


@pytest.mark.parametrize("wanted", [{"network": "tap"}, {"networks": [Tap()]}], ids=["mode", "TAP"])
def test_outbound_is_refused_where_it_cannot_be_kept_from_the_guest(chvm_vm, needs_taps, wanted):
    with pytest.raises(UnsupportedError, match="the host is the guest's neighbour"):
        chvm_vm(vmm="qemu", outbound=False, **wanted)


def test_a_vm_without_outbound_gets_no_tap_later(chvm_vm):
    with pytest.raises(UnsupportedError, match="it has outbound=False"):
        chvm_vm(vmm="qemu", outbound=False, hotplug=True).add_network()


def test_outbound_is_a_truth():
    with pytest.raises(InvalidConfigError, match="outbound='no', expected True or False"):
        VmConfig(outbound="no")

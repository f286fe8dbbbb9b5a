"""A sender and a server on a network of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pytest_chvm import Network, VmFactory

PORT = 5140
GUEST_PROGRAMS = Path(__file__).parents[1] / "logbox" / "guest"


def test_one_machine_logs_to_another(chvm_vm: VmFactory, chvm_network: Callable[..., Network]) -> None:
    network = chvm_network()
    # Both boot at the same time.
    server = chvm_vm(name="server", networks=[network], wait=False, shared_dirs={"logbox": GUEST_PROGRAMS})
    sender = chvm_vm(name="sender", networks=[network], wait=False)
    server.wait_ready()
    sender.wait_ready()
    server.check_output(f"/mnt/logbox/logboxd /tmp {PORT}")

    assert sender.check_output(f"echo from the sender | nc {server.ip} {PORT}") == "OK\n"
    assert server.check_output("cat /tmp/log") == "from the sender\n"

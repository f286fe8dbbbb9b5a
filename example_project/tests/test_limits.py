"""What only a kernel can set up: a volume of 32 KiB, a network device that leads nowhere. One VM serves all of these."""

from __future__ import annotations

import pytest
from logbox import Client, LogboxError

from pytest_chvm import Vm

PORT = 5140


def test_a_full_volume_refuses_the_line_and_keeps_the_others(shared_vm: Vm, small_volume: str) -> None:
    with Client(shared_vm.address(PORT)) as client:
        client.send("first")
        with pytest.raises(LogboxError, match="no space left"):
            client.send("x" * 40_000)
        client.send("last")

    assert shared_vm.check_output(f"cat {small_volume}/log") == "first\nlast\n"


def test_a_client_reaches_a_service_address(shared_vm: Vm, small_volume: str, dummy_module: str) -> None:
    shared_vm.check_output(
        f"ip link add service0 type {dummy_module} && ip addr add 10.77.0.1/32 dev service0 && ip link set service0 up"
    )
    try:
        answer = shared_vm.check_output(f"echo hello | nc 10.77.0.1 {PORT}")
    finally:
        shared_vm.check_output("ip link del service0")

    assert answer == "OK\n"


def test_the_daemon_says_when_its_port_is_taken(shared_vm: Vm, small_volume: str) -> None:
    second = shared_vm.run(f"nc -l -p {PORT} </dev/null")

    assert second.returncode != 0
    assert "Address already in use" in second.stderr

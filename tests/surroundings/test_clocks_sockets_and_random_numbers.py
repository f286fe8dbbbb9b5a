"""VMs under what tests do to their own process: a frozen clock, no sockets, seeded random numbers, a running event loop."""

from __future__ import annotations

import ast
import asyncio
import random
import secrets
import socket
import subprocess
import sys
import time
import uuid
import warnings
from pathlib import Path

import freezegun
import pytest
import pytest_socket
import time_machine

import pytest_chvm
from pytest_chvm import CommandTimeoutError, launch
from pytest_chvm.base import untouched as untouched
from pytest_chvm.host import netlink

FREEZERS = {
    "freezegun": lambda: freezegun.freeze_time("2012-01-14"),
    "time-machine": lambda: time_machine.travel("2012-01-14", tick=False),
}
# What the rest of the package has from `untouched`.
REPLACED = {
    "time.monotonic", "time.monotonic_ns", "time.time", "time.time_ns", "time.perf_counter", "datetime.now", "socket.socketpair",
    "socket.create_server", "socket.create_connection", "uuid.uuid4", "os.urandom",
}  # fmt: skip
# In a process of its own, or not in a test's.
ELSEWHERE = {
    "base/untouched.py",
    "host/keeper/keeper.py",
    "host/keeper/logbound.py",
    "lab/__init__.py",
    "lab/agent.py",
    "plugin/inside/program.py",
}


@pytest.fixture(params=FREEZERS.values(), ids=FREEZERS.keys())
def frozen(request):
    return request.param


@pytest.mark.timeout(60)
def test_deadlines_end_a_command_while_the_clock_is_frozen(chvm_vm, frozen):
    with frozen():
        vm = chvm_vm()
        with pytest.raises(CommandTimeoutError):
            vm.run("sleep 100", timeout=1)
        # Of the host, whose time the test has never had.
        guest_s = int(vm.check_output("date +%s"))
        vm.pause()
        vm.resume()
    assert abs(guest_s - time.time()) < 30


@pytest.mark.timeout(20)
def test_a_lock_that_somebody_has_is_not_waited_for_while_the_clock_is_frozen(frozen):
    from pytest_chvm.host.host import default_host
    from pytest_chvm.host.leases import Lease
    from pytest_chvm.host.locks import HeldLock

    lease = Lease(default_host())
    try:
        name = f"test-{untouched.random_hex(4)}.lock"
        held = HeldLock(name, lease)
        with frozen(), pytest.raises(TimeoutError):
            HeldLock(name, lease, timeout_s=0)
        held.release()
    finally:
        lease.release()


def test_clocks_are_the_hosts_while_a_test_has_another(frozen):
    # An old time-machine leaves `time.monotonic` its own.
    before_s = time.clock_gettime(time.CLOCK_MONOTONIC)
    with frozen():
        assert before_s <= untouched.monotonic_s() == pytest.approx(before_s, abs=5)
        wall_s = untouched.wall_clock_s()
    assert wall_s == pytest.approx(time.time(), abs=5)


def test_the_wall_clock_is_exact():
    assert time.time_ns() <= untouched.wall_clock_ns() <= time.time_ns()


def assert_guarded():
    # Newer ones warn too.
    with warnings.catch_warnings(action="ignore"), pytest.raises(pytest_socket.SocketBlockedError):
        socket.socket()


@pytest.mark.parametrize("network", ["tap", "user"])
def test_vms_start_and_are_cloned_where_a_test_may_have_no_sockets(chvm_vm, needs_taps, socket_disabled, network):
    vm = chvm_vm(network=network)
    assert vm.check_output("echo hi") == "hi\n"
    assert vm.address(80)[1]
    with vm.snapshot().clone() as clone:
        assert clone.check_output("echo hi") == "hi\n"
    assert_guarded()


def test_a_whole_run_may_have_no_sockets():
    code = """
import pytest_chvm.plugin
import pytest_socket, socket
pytest_socket.disable_socket()
from pytest_chvm import launch
with launch(vmm="qemu") as vm:
    assert vm.check_output("echo hi") == "hi\\n"
pytest_socket.enable_socket()
import ssl
assert ssl.SSLSocket.__mro__[1] is socket.socket, ssl.SSLSocket.__mro__
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_no_directory_is_left_where_the_keeper_cannot_start(monkeypatch):
    from pytest_chvm.host import keeper_client
    from pytest_chvm.host.directories import runtime_dir
    from pytest_chvm.host.runs import Run

    def refuse(*_arguments):
        raise OSError(24, "Too many open files")

    def mine():
        return [
            place
            for place in runtime_dir().iterdir()
            if f'"pid": {keeper_client.os.getpid()},' in (place / "owner.json").read_text()
        ]

    before = mine()
    monkeypatch.setattr(keeper_client, "socket_pair", refuse)
    with pytest.raises(OSError, match="Too many"):
        keeper_client.Keeper(Run())
    assert mine() == before


def test_a_guard_that_a_test_puts_up_or_takes_away_stays_as_the_test_wants_it():
    true = socket.socket
    try:
        pytest_socket.disable_socket()
        with untouched.sockets_for_libraries():
            socket.socket().close()
            pytest_socket.enable_socket()
        assert socket.socket is true
        with untouched.sockets_for_libraries():
            pytest_socket.disable_socket()
        assert_guarded()
    finally:
        pytest_socket.enable_socket()


def test_hosts_that_a_test_allows_are_no_matter_for_our_sockets(socket_pair_path):
    pytest_socket.socket_allow_hosts(["192.0.2.1"])
    try:
        with untouched.Socket(socket.AF_UNIX) as client:
            client.connect(socket_pair_path)
    finally:
        pytest_socket._remove_restrictions()


@pytest.fixture
def socket_pair_path(tmp_path):
    with untouched.Socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        yield str(tmp_path / "s")


@pytest.mark.parametrize("network", ["tap", "user"])
def test_vms_start_while_an_event_loop_runs(chvm_vm, needs_taps, network):
    async def test():
        vm = chvm_vm(network=network)
        vm.pause()
        vm.resume()
        assert vm.address(80)[1]
        assert await asyncio.to_thread(vm.check_output, "echo hi") == "hi\n"
        with vm.snapshot().clone() as clone:
            assert clone.check_output("echo hi") == "hi\n"

    asyncio.run(test())


def test_vms_have_their_own_ids_and_links_whatever_random_numbers_a_test_has(monkeypatch, needs_taps):
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=7))
    monkeypatch.setattr(secrets, "token_hex", lambda _size=None: "00")
    random.seed(7)
    with launch(network="tap") as one:
        random.seed(7)
        with launch(network="tap") as other:
            assert one.handle.machine_id != other.handle.machine_id
            assert one.config.networks != other.config.networks
            assert one.ip != other.ip


def test_what_tests_replace_is_taken_from_one_module():
    top = Path(pytest_chvm.__file__).parent
    found = []
    for file in top.rglob("*.py"):
        if str(file.relative_to(top)) in ELSEWHERE:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            used = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if used in REPLACED or used.startswith(("random.", "secrets.")):
                found.append(f"{file}:{node.lineno}: {used}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "socket.socket":
                found.append(f"{file}:{node.lineno}: socket.socket(...)")
    assert not found, "\n".join(found)


def test_what_the_kernel_refuses_over_netlink_has_its_number():
    with netlink.route_socket(None) as route, pytest.raises(OSError, match="No such device") as caught:
        route.link("set", index=0x7FFFFFF0, state="up")
    assert caught.value.errno == 19

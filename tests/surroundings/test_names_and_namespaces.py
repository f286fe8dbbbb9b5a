"""Links of the host in company: names that others have, random numbers that a test has seeded, namespaces that went."""

from __future__ import annotations

import ipaddress
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_chvm.base.deadline import Deadline
from pytest_chvm.base.untouched import random_hex
from pytest_chvm.errors import HostError, InvalidConfigError
from pytest_chvm.host.host import default_host
from pytest_chvm.host.keeper.records import read_lease
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.namespaces import inside
from pytest_chvm.host.netlink import route_socket
from pytest_chvm.host.networks import isolated, tap
from pytest_chvm.host.networks.isolated import make_bridge
from pytest_chvm.host.networks.subnets import parse_pool, take_subnet
from pytest_chvm.host.networks.tap import interface_exists, make_tap, open_tap
from pytest_chvm.host.relay import NamespaceRelay


@pytest.fixture
def lease(needs_taps: None) -> Iterator[Lease]:
    lease = Lease(default_host())
    yield lease
    assert lease.release() == []


def names_from(monkeypatch: pytest.MonkeyPatch, *endings: str) -> None:
    """Have names end in these, and then in others."""
    given = iter(endings)
    for module in (isolated, tap):
        monkeypatch.setattr(module, "random_hex", lambda size: next(given, None) or random_hex(size))


def test_names_and_subnets_are_not_those_of_a_seed(lease: Lease) -> None:
    made = []
    for _time in range(2):
        random.seed(7)
        subnet = take_subnet(parse_pool("198.18.0.0/15"), 30, lease)
        made.append((make_tap(lease, None, None, None), subnet.network))
        subnet.release()
    assert made[0][0] != made[1][0]
    assert made[0][1] != made[1][1]


def test_a_tap_of_that_name_that_is_there_is_not_taken_and_not_removed(
    lease: Lease, tap_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = os.urandom(4).hex()
    theirs = f"chvm{ending}"
    subprocess.run(["ip", "tuntap", "add", "dev", theirs, "mode", "tap"], check=True)
    try:
        names_from(monkeypatch, ending)
        assert make_tap(lease, None, None, None) != theirs
        with pytest.raises(HostError, match="there is an interface of that name"):
            make_tap(lease, theirs, None, None)
        assert lease.release() == []
        assert interface_exists(theirs, None)
    finally:
        subprocess.run(["ip", "link", "del", theirs], check=True)


def test_a_bridge_of_that_name_that_is_there_is_not_taken_and_not_removed(
    lease: Lease, monkeypatch: pytest.MonkeyPatch, pool: str
) -> None:
    ending = os.urandom(4).hex()
    theirs = f"chvmbr{ending}"
    subprocess.run(["ip", "link", "add", theirs, "type", "bridge"], check=True)
    try:
        names_from(monkeypatch, ending)
        subnet = take_subnet(parse_pool(pool), 30, lease)
        ours = make_bridge(lease, ipaddress.IPv4Interface((subnet.host, 30)))
        assert read_lease(str(lease.directory))["bridges"] == [ours]
        assert lease.release() == []
        subnet.release()
        assert interface_exists(theirs, None)
    finally:
        subprocess.run(["ip", "link", "del", theirs], check=True)


KILLED_WHILE_IT_MAKES_ONE = """
import os, sys
from pytest_chvm.host.networks.tap import make_tap

class Lease:
    def add_tap(self, name, netns):
        print(name, os.path.exists(f"/sys/class/net/{name}"), flush=True)
        os.kill(os.getpid(), 9)

make_tap(Lease(), None, None, None)
"""


def test_a_tap_whose_maker_is_killed_before_it_is_recorded_is_gone(needs_taps: None) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_IT_MAKES_ONE], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    name, was_there = done.stdout.split()
    assert was_there == "True"
    assert not interface_exists(name, None)


@pytest.mark.parametrize(
    "enter",
    [
        lambda lease, netns: route_socket(netns).__enter__(),
        lambda lease, netns: interface_exists("lo", netns),
        lambda lease, netns: open_tap("chvmtest0", netns, ours=False),
        lambda lease, netns: make_tap(lease, None, None, netns),
    ],
    ids=["routes", "look", "attach", "make"],
)
def test_a_namespace_that_went_is_not_made_again(lease: Lease, enter: object) -> None:
    with pytest.raises(InvalidConfigError, match="network namespace 'chvmtest-gone' does not exist"):
        enter(lease, "chvmtest-gone")  # type: ignore[operator]
    assert not Path("/run/netns/chvmtest-gone").exists()


def test_a_relay_into_a_namespace_that_went_closes_its_clients_and_makes_none(needs_taps: None) -> None:
    relay = NamespaceRelay("chvmtest-gone", ("127.0.0.1", 80))
    try:
        with socket.create_connection(relay.address, timeout=20) as client:
            assert client.recv(1) == b""
        assert not Path("/run/netns/chvmtest-gone").exists()
    finally:
        relay.close()


def test_a_thread_is_back_where_it_was(netns: str) -> None:
    def where() -> str:
        return os.readlink("/proc/thread-self/ns/net")

    found = []

    def fail_inside() -> None:
        with inside(netns):
            found.append(where())
            raise RuntimeError

    def work() -> None:
        found.append(where())
        with pytest.raises(RuntimeError):
            fail_inside()
        found.append(where())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0] == found[2] == where() != found[1]


def test_a_relays_client_whose_target_does_not_answer_keeps_no_other_waiting(netns: str) -> None:
    target = ("192.0.2.1", 80)
    for words in ("link add br0 type bridge", "link set br0 up", "route add 192.0.2.0/24 dev br0"):
        subprocess.run(["ip", "-n", netns, *words.split()], check=True)
    # Nobody is there to take what is sent to it.
    neighbour = f"neigh add {target[0]} lladdr 52:54:00:00:00:01 dev br0 nud permanent"
    subprocess.run(["ip", "-n", netns, *neighbour.split()], check=True)
    relay = NamespaceRelay(netns, target)
    try:
        with socket.create_connection(relay.address), socket.create_connection(relay.address):
            assert connections_being_made(netns, 2) == 2
    finally:
        relay.close()


def connections_being_made(netns: str, wanted: int) -> int:
    """Return how many connections are being made in the namespace, once they are as many as wanted or 5 s are over."""
    deadline = Deadline.after(5)
    while True:
        shown = subprocess.run(["ip", "netns", "exec", netns, "cat", "/proc/net/tcp"], capture_output=True, text=True, check=True)
        # SYN_SENT of the kernel's net/tcp_states.h.
        found = sum(line.split()[3] == "02" for line in shown.stdout.splitlines()[1:])
        if found == wanted or deadline.expired:
            return found

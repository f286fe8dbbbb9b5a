"""Whatever bytes a guest, a VMM or a stranger's file has for us: a value that fits, or our own error that says so, and soon."""

import contextlib
import json
import os
import socket
import threading
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_chvm import HypervisorError, InvalidConfigError, Settings, VmError, VmIOError
from pytest_chvm.drivers.cloud_hypervisor import api as ch_api
from pytest_chvm.drivers.cloud_hypervisor.events import EventMonitor
from pytest_chvm.drivers.qemu import qmp
from pytest_chvm.guest.channels import Line
from pytest_chvm.guest.channels.console.shell import GuestShell
from pytest_chvm.guest.ready import PanicScanner
from pytest_chvm.settings import OPTIONS

any_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
few = settings(any_file, max_examples=40)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
# Deeper than Python's own parser goes.
DEEP = st.just(b"[" * 5000)


class Peer:
    """Answers each connection to a UNIX socket with some bytes, and closes it."""

    def __init__(self, path):
        self.path = path
        self.answer = b""
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(os.fspath(path))
        self.listener.listen()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                client.settimeout(120)
                client.sendall(self.answer)
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536):
                    continue


@pytest.fixture
def peer(tmp_path):
    peer = Peer(tmp_path / "peer.sock")
    yield peer
    peer.listener.shutdown(socket.SHUT_RDWR)
    peer.listener.close()


STATUS_LINES = st.sampled_from([b"HTTP/1.1 200 OK", b"HTTP/1.1 204 No Content", b"HTTP/1.1 500 X", b"HTTP/9.9 -1", b"", b"\0"])
HEADERS = st.sampled_from(
    [
        b"Content-Length: 5",
        b"Content-Length: -1",
        b"Content-Length: x",
        b"Transfer-Encoding: chunked",
        b"Content-Encoding: gzip",
        b"\xff: \0",
    ]
)


@few
@given(
    STATUS_LINES, st.lists(HEADERS, max_size=3), st.binary(max_size=60) | DEEP | JSON.map(lambda value: json.dumps(value).encode())
)
def test_an_answer_of_cloud_hypervisors_api(peer, status, headers, body):
    peer.answer = b"\r\n".join([status, *headers, b"", body])
    answer, said = {}, ""
    try:
        answer = ch_api.call("v", peer.path, "vm.info", ask=True)
    except (HypervisorError, VmIOError) as error:
        said = str(error)
    assert isinstance(answer, dict)
    assert len(said) < 2000


@few
@given(st.binary(max_size=60) | st.from_regex(rb"OK [0-9]{0,20}\n.*", fullmatch=True))
def test_an_answer_of_a_vsock_socket(peer, answer):
    peer.answer = answer
    try:
        ch_api.connect_vsock("v", peer.path, 5000).close()
    except VmIOError:
        return
    assert answer.startswith(b"OK ")


GREETING = json.dumps(
    {"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}
).encode()


@settings(few, max_examples=20)
@given(st.lists(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()), max_size=3), st.booleans())
def test_an_answer_of_qmp(peer, lines, greets):
    peer.answer = b"".join(line + b"\r\n" for line in [*([GREETING] if greets else []), *lines])
    with pytest.raises((HypervisorError, VmIOError)):
        qmp.execute("v", peer.path, "query-status", {})


USERNET_ROWS = st.lists(
    st.sampled_from(
        [
            "  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n",
            "  TCP[HOST_FORWARD]  12       127.0.0.1 40123       10.0.2.15    80     0     0\r\n",
            "  TCP[HOST_FORWARD]  13       127.0.0.1 40124       10.0.2.15    81     0     0\r\n",
            "  TCP[ESTABLISHED]   14       127.0.0.1    80       10.0.2.15    80     0     0\r\n",
            "  UDP[HOST_FORWARD]  15       127.0.0.1 40125       10.0.2.15    80     0     0\r\n",
            "  TCP[HOST_FORWARD]  16         0.0.0.0 40126       10.0.2.15    80     0     0\r\n",
            "  TCP[HOST_FORWARD]  17       127.0.0.1 99999999999999999999999    80    80     0     0\r\n",
        ]
    )
    | st.text(max_size=80),
    max_size=8,
)


@given(st.text(max_size=40), USERNET_ROWS.map("".join), st.integers(1, 65535) | st.sampled_from([80, 81]))
def test_a_listing_of_forwarded_ports(answer, listing, port):
    try:
        host, host_port = qmp.forwarded_port("v", answer, listing, port)
    except HypervisorError:
        return
    assert host == "127.0.0.1"
    assert 0 < host_port < 65536


EVENTS = st.lists(
    st.binary(max_size=60)
    | st.sampled_from([b"\n\n", b"[", b'{"source": {}, "event": []}', b'{"source": "vm", "event": "booted"}', b"1e999"])
    | DEEP
    | JSON.map(lambda value: json.dumps(value).encode()),
    max_size=8,
)


@any_file
@given(EVENTS)
def test_events_of_cloud_hypervisor(tmp_path, pieces):
    log = tmp_path / "events.json"
    log.write_bytes(b"".join(pieces))
    assert EventMonitor("v", log).read() is None


@any_file
@given(st.lists(st.binary(max_size=80) | st.sampled_from([b"\nKernel panic - not syncing: ", b"\x1b[31m", b"\r"]), max_size=8))
def test_a_panic_on_the_console(tmp_path, pieces):
    log = tmp_path / "serial.log"
    log.write_bytes(b"".join(pieces))
    panic = PanicScanner(log).scan()
    assert panic is None or (panic.startswith("Kernel panic") and len(panic) < 300)
    assert not [character for character in panic or "" if unicodedata.category(character) == "Cc" and character != "\t"]


SHELL_PIECES = st.lists(
    st.binary(max_size=60)
    | st.sampled_from(
        [
            b"\nTOKEN out 3\n",
            b"\nTOKEN out 999999999999999\n",
            b"\nTOKEN err 0\n",
            b"\nTOKEN end 0\n",
            b"\nTOKEN end 999\n",
            b"\nTOKEN end -1\n",
        ]
    ),
    max_size=10,
)


@settings(any_file, max_examples=100)
@given(SHELL_PIECES, st.booleans())
def test_an_answer_of_the_guests_shell(pieces, greets):
    """The guest knows the token of the command it was given, and may say anything with it."""
    ours, theirs = socket.socketpair()

    def guest():
        with theirs, contextlib.suppress(OSError), theirs.makefile("rb") as lines:
            for line in lines:
                words = line.split()
                if words[:1] == [b"eval"] and greets:
                    theirs.sendall(b"\n%s loop\n" % words[1])
                elif words[:1] in ([b"run"], [b"eval"]):
                    theirs.sendall(b"".join(pieces).replace(b"TOKEN", words[1]))
                    theirs.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=guest, daemon=True)
    thread.start()
    shell = GuestShell(Line("v", lambda: os.dup(ours.fileno()), list, lambda: None, lambda: None, 1 << 15))
    said = ""
    try:
        done = shell.run("true", timeout=5, input=None)
        assert 0 <= done.returncode <= 255
        assert b"TOKEN end" in b"".join(pieces)
    except VmError as error:
        said = str(error)
    finally:
        shell.close()
        ours.close()
        thread.join(5)
    assert len(said) < 10_000


@given(st.sampled_from(OPTIONS), st.text(max_size=40))
def test_the_text_of_an_option(option, text):
    value, said = option.default, None
    try:
        value = getattr(Settings.resolve({}, {option.variable: text}, {}), option.name)
    except InvalidConfigError as error:
        said = str(error)
    assert said is None or option.variable in said
    if option.choices:
        assert value in option.choices
    if option.metavar == "N":
        assert value is None or value >= 1

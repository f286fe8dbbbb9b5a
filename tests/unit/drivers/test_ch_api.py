"""Cloud Hypervisor's API against a peer on a real socket that misbehaves, and its events whatever they are cut into."""

import gc
import json
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_chvm import GuestPanicError, GuestRebootError, GuestShutdownError, HypervisorError, VmIOError
from pytest_chvm.drivers.cloud_hypervisor import api as ch_api
from pytest_chvm.drivers.cloud_hypervisor.events import LONGEST_EVENT, EventMonitor


@pytest.fixture
def peer(tmp_path):
    """Serves one connection with the bytes it is given; None: says nothing until the client has gone."""
    path = tmp_path / "api.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve(answer):
        def work():
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                if answer is None:
                    client.recv(1)
                else:
                    client.sendall(answer)

        threading.Thread(target=work, daemon=True).start()
        return path

    yield serve
    listener.close()


def http(status, body):
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def test_an_answer_is_the_json_in_it(peer):
    assert ch_api.call("v", peer(http(200, '{"state": "Running"}')), "vm.info", ask=True) == {"state": "Running"}


def test_an_answer_without_body_is_empty(peer):
    assert ch_api.call("v", peer(b"HTTP/1.1 204 No Content\r\n\r\n"), "vm.pause") == {}


def test_a_refusal_shows_all_its_reasons(peer):
    with pytest.raises(HypervisorError, match=r"'vm\.pause' with status 500: outer: inner"):
        ch_api.call("v", peer(http(500, '["outer", "inner"]')), "vm.pause")


@pytest.mark.parametrize("body", ["not json", "[1]", '"text"'])
def test_an_answer_that_makes_no_sense_is_an_error(peer, body):
    with pytest.raises(HypervisorError, match="makes no sense"):
        ch_api.call("v", peer(http(200, body)), "vm.info", ask=True)


def test_an_answer_that_breaks_off_is_an_error(peer):
    with pytest.raises(HypervisorError, match="broke off"):
        ch_api.call("v", peer(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"state"'), "vm.info", ask=True)


def test_a_vmm_that_never_answers_is_given_up(peer, monkeypatch):
    monkeypatch.setattr(ch_api, "ANSWER_TIMEOUT_S", 0.2)
    with pytest.raises(HypervisorError, match=r"did not answer 'vm\.info' within 0\.2 s"):
        ch_api.call("v", peer(None), "vm.info", ask=True)


# httpcore 1.0 leaves the socket of a failed connect to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_vmm_that_is_gone_cannot_be_reached(tmp_path):
    with pytest.raises(VmIOError, match="cannot be reached"):
        ch_api.call("v", tmp_path / "nobody.sock", "vm.info", ask=True)
    # Here, and not in a later test, whichever Python this is.
    gc.collect()


def test_a_request_above_the_limit_is_refused_before_it_is_sent(tmp_path):
    with pytest.raises(HypervisorError, match="51200"):
        ch_api.call("v", tmp_path / "nobody.sock", "vm.add-disk", {"path": "x" * 60000})


@pytest.mark.parametrize("answer", [b"", b"ERR\n", b"OK x\n", b"x" * 100])
def test_a_vsock_port_that_nobody_listens_at_is_an_error(peer, answer):
    with pytest.raises(VmIOError, match="port 5000"):
        ch_api.connect_vsock("v", peer(answer), 5000)


def test_bytes_behind_the_vsock_answer_are_the_guests(peer):
    with ch_api.connect_vsock("v", peer(b"OK 1024\nhello"), 5000) as stream:
        stream.settimeout(120)
        assert stream.recv(16) == b"hello"


def event(source, name):
    return json.dumps({"timestamp": {"secs": 0, "nanos": 1}, "source": source, "event": name, "properties": None}) + "\n\n"


BOOT = event("vmm", "starting") + event("vm", "booting") + event("vm", "booted")


@pytest.mark.parametrize(
    ("what", "kind"),
    [(("guest", "panic"), GuestPanicError), (("vm", "rebooting"), GuestRebootError), (("vm", "shutdown"), GuestShutdownError)],
)
def test_what_befalls_the_guest_is_its_own_error(tmp_path, what, kind):
    log = tmp_path / "events.json"
    log.write_text(BOOT + event(*what))
    assert isinstance(EventMonitor("v", log).read(), kind)


def test_a_reboot_that_was_asked_for_is_no_trouble(tmp_path):
    log = tmp_path / "events.json"
    log.write_text(BOOT + event("vm", "rebooting"))
    assert EventMonitor("v", log, expected_reboots=1).read() is None


def test_the_end_of_a_boot_that_failed_is_not_the_guests_doing(tmp_path):
    log = tmp_path / "events.json"
    log.write_text(event("vm", "booting") + event("vm", "shutdown"))
    assert EventMonitor("v", log).read() is None


@given(st.lists(st.integers(1, 200), max_size=30), st.binary(max_size=200))
def test_events_are_found_however_they_are_cut(tmp_path_factory, cuts, noise):
    log = tmp_path_factory.mktemp("events") / "events.json"
    log.touch()
    whole = (BOOT + event("vm", "rebooting")).encode()
    monitor = EventMonitor("v", log)
    for size in [*cuts, len(whole)]:
        piece, whole = whole[:size], whole[size:]
        with log.open("ab") as file:
            file.write(piece)
        monitor.read()
    with log.open("ab") as file:
        file.write(noise)
    assert isinstance(monitor.read(), GuestRebootError)


def test_endless_nonsense_is_not_kept(tmp_path):
    log = tmp_path / "events.json"
    log.write_bytes(b"{" * (LONGEST_EVENT * 4))
    monitor = EventMonitor("v", log)
    assert monitor.read() is None
    assert len(monitor._pending) <= 2 * LONGEST_EVENT

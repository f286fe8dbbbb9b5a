"""Saves and loads against a QMP peer on a real socket that does what QEMU may do at times."""

import json
import socket
import threading

import pytest

from pytest_chvm import HypervisorError
from pytest_chvm.base.deadline import Deadline
from pytest_chvm.drivers.qemu import state as qemu_state
from tests.conftest import AT_ONCE_S

GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}


class Peer:
    """Answers one client; `migrate` ends with `status`, and the VM is let go of when that was asked for three times.

    `migrate-incoming` does not end.
    """

    def __init__(self, path, status="completed"):
        self.commands = []
        self._status = status
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        client, _ = self._listener.accept()
        with client:
            client.sendall(json.dumps(GREETING).encode() + b"\n")
            # The client ends no message with a newline, and waits for the answer to each. A descriptor comes with a space.
            while received := client.recv(65536):
                if not received.isspace():
                    command = json.loads(received)
                    for message in self._answers(command["execute"]):
                        client.sendall(json.dumps({"id": command.get("id"), **message}).encode() + b"\n")

    def _answers(self, command):
        self.commands.append(command)
        if command == "query-status":
            asked = self.commands.count(command)
            yield {"return": {"status": "finish-migrate" if asked < 3 else "postmigrate"}}
        elif command == "query-migrate":
            yield {"return": {"status": "failed", "error-desc": "no room"}}
        else:
            yield {"return": {}}
        if command == "migrate":
            yield {"event": "MIGRATION", "data": {"status": self._status}, "timestamp": {"seconds": 1, "microseconds": 0}}

    def close(self):
        self._thread.join(10)
        self._listener.close()


@pytest.mark.parametrize("status", ["completed", "failed"])
def test_a_save_returns_when_the_vm_can_go_on(tmp_path, status):
    peer = Peer(tmp_path / "qmp.sock", status)
    try:
        if status == "completed":
            qemu_state.save("vm", tmp_path / "qmp.sock", tmp_path / "state", memory_is_shared=True)
        else:
            with pytest.raises(HypervisorError, match="'migrate' failed: no room"):
                qemu_state.save("vm", tmp_path / "qmp.sock", tmp_path / "state", memory_is_shared=True)
    finally:
        peer.close()
    assert peer.commands.count("query-status") == 3


def test_a_load_that_does_not_end_is_given_up_in_time(tmp_path):
    async def never(_client):
        raise AssertionError("it has not been loaded")

    (tmp_path / "state").touch()
    peer = Peer(tmp_path / "qmp.sock")
    try:
        at_once = Deadline.after(AT_ONCE_S)
        with pytest.raises(HypervisorError, match=r"QEMU did not end 'migrate-incoming' within 0.2 s"):
            qemu_state.load("vm", tmp_path / "qmp.sock", tmp_path / "state", 0.2, memory_is_shared=True, then=never)
        assert not at_once.expired
    finally:
        peer.close()

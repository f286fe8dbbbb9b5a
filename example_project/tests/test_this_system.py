"""The host's own system as the guest's: its tools and its Python, as root of a machine that is thrown away afterwards."""

from __future__ import annotations

import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from logbox import Client, LogboxError

from pytest_chvm import VmFactory

SESSION = Path(__file__).parents[1] / "logbox" / "guest" / "logbox-session"


def test_the_daemon_works_with_this_systems_tools_too(chvm_vm: VmFactory) -> None:
    vm = chvm_vm(root="host")
    vm.check_output("mount -t tmpfs -o size=32k small /mnt")

    done = vm.run([str(SESSION), "/mnt"], input="first\n" + "x" * 40_000 + "\nlast\n")

    assert done.stdout.splitlines() == ["OK", "ERR no space left for this line", "OK"]
    assert vm.read_text("/mnt/log") == "first\nlast\n"


class Session(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Server)
        subprocess.run([SESSION, self.server.volume], stdin=self.request, stdout=self.request, check=True)


class Server(socketserver.TCPServer):
    def __init__(self, volume: Path) -> None:
        super().__init__(("127.0.0.1", 0), Session)
        self.volume = volume
        self.address = ("127.0.0.1", self.socket.getsockname()[1])


@pytest.fixture
def small_server(tmp_path: Path) -> Iterator[Server]:
    """A server on a volume of 32 KiB: for tests inside, since mounting takes root, and who runs tests is not always."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "small", tmp_path], check=True)
    with Server(tmp_path) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.chvm(inside=True)
def test_the_client_says_when_the_volume_is_full(small_server: Server) -> None:
    with Client(small_server.address) as client:
        client.send("first")
        with pytest.raises(LogboxError, match="no space left"):
            client.send("x" * 40_000)
        client.send("last")

    assert (small_server.volume / "log").read_text() == "first\nlast\n"

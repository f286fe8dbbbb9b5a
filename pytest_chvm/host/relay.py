"""TCP relays from the host's loopback to where a test cannot connect itself: into a named network namespace, for `Vm.address`."""

from __future__ import annotations

import contextlib
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator

from pytest_chvm.base.untouched import Socket
from pytest_chvm.errors import VmError
from pytest_chvm.host.namespaces import inside

CONNECT_TIMEOUT_S = 10.0


class Relay(ABC):
    """Listens on loopback and serves each client in a thread, until `close`."""

    def __init__(self) -> None:
        self._listener = Socket(socket.AF_INET)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        host, port = self._listener.getsockname()
        self.address: tuple[str, int] = (host, port)
        threading.Thread(target=self._accept, name=f"chvm-relay-{port}", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _peer = self._listener.accept()
            except OSError:
                # Closed: there is nothing left to serve.
                return
            # A target that does not answer must not keep the next client from one that does by then.
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        # The client sees the connection close where this fails, as it would for a refused one.
        with contextlib.suppress(OSError, VmError), client, self.ended_by_close(client):
            self.serve(client)

    @abstractmethod
    def serve(self, client: socket.socket) -> None:
        """Serve a client until its connection ends; it is closed then, also where this raises OSError or VmError."""

    @contextlib.contextmanager
    def ended_by_close(self, end: socket.socket) -> Iterator[None]:
        """Have a connection ended by `close` in the block."""
        with self._lock:
            if self._closed:
                raise ConnectionAbortedError("the relay was closed")
            self._open.add(end)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(end)

    def close(self) -> None:
        """Stop listening and end the connections that are open: the guest is gone, and cannot."""
        with self._lock:
            self._closed = True
            for end in (self._listener, *self._open):
                _shut(end, socket.SHUT_RDWR)
        self._listener.close()


class NamespaceRelay(Relay):
    """Connects each client to `target` inside the namespace."""

    def __init__(self, netns: str, target: tuple[str, int]) -> None:
        self._netns = netns
        self._target = target
        super().__init__()

    def serve(self, client: socket.socket) -> None:
        """Connect a client to the target."""
        with inside(self._netns):
            server = _connected(self._target)
        with server, self.ended_by_close(server):
            server.settimeout(None)
            back = threading.Thread(target=_copy, args=(server, client), daemon=True)
            back.start()
            _copy(client, server)
            back.join()


def _connected(target: tuple[str, int]) -> Socket:
    server = Socket(socket.AF_INET6 if ":" in target[0] else socket.AF_INET)
    try:
        server.settimeout(CONNECT_TIMEOUT_S)
        server.connect(target)
    except BaseException:
        server.close()
        raise
    return server


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        _shut(sink, socket.SHUT_WR)
    except OSError:
        # One side is gone, so the other has nothing to wait for, in either direction.
        _shut(source, socket.SHUT_RDWR)
        _shut(sink, socket.SHUT_RDWR)


def _shut(end: socket.socket, how: int) -> None:
    # One that is not connected any more is shut already.
    with contextlib.suppress(OSError):
        end.shutdown(how)

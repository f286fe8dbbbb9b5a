"""A TCP relay from the host's loopback into a named network namespace, for `Vm.address`."""

from __future__ import annotations

import contextlib
import socket
import threading


class NamespaceRelay:
    """Listens on loopback and connects each client to `target` inside the namespace, until `close`."""

    def __init__(self, netns: str, target: tuple[str, int]) -> None:
        self._netns = netns
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        host, port = self._listener.getsockname()
        self.address: tuple[str, int] = (host, port)
        threading.Thread(target=self._accept, name=f"chvm-relay-{port}", daemon=True).start()

    def _accept(self) -> None:
        from pyroute2 import netns as namespaces

        # The namespace is this thread's alone; a socket stays in the one it was made in.
        namespaces.setns(self._netns)
        while True:
            try:
                client, _peer = self._listener.accept()
            except OSError:
                # Closed: there is nothing left to serve.
                return
            try:
                server = socket.create_connection(self._target, timeout=10)
                server.settimeout(None)
            except OSError:
                # The client sees the connection close, as it would for a refused one.
                client.close()
                continue
            threading.Thread(target=self._serve, args=(client, server), daemon=True).start()

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        with client, server:
            with self._lock:
                self._open |= {client, server}
            back = threading.Thread(target=_copy, args=(server, client), daemon=True)
            back.start()
            _copy(client, server)
            back.join()
            with self._lock:
                self._open -= {client, server}

    def close(self) -> None:
        """Stop listening and end the connections that are open: the guest is gone, and cannot."""
        with self._lock:
            for end in (self._listener, *self._open):
                _shut(end, socket.SHUT_RDWR)
        self._listener.close()


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

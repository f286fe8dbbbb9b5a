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
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=_copy, args=(source, sink), daemon=True).start()

    def close(self) -> None:
        """Stop listening; connections that are open go on until one side ends them."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        # One side is gone, so the other has nothing to wait for.
        source.close()
        sink.close()

"""Cloud Hypervisor's HTTP API, over the UNIX socket the VMM inherited.

GET asks, PUT does; 200 comes with a body and 204 without; an error is a JSON array, outermost message first.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from pytest_chvm.base.untouched import Socket, sockets_for_libraries
from pytest_chvm.errors import HypervisorError, VmIOError

ANSWER_TIMEOUT_S = 10.0
# micro_http's limit for a request (vmm/src/api/http/mod.rs).
LARGEST_BODY = 51200


def call(
    vm_name: str, socket_path: Path, endpoint: str, body: Mapping[str, object] | None = None, *, ask: bool = False
) -> dict[str, object]:
    """Call one endpoint (`vm.pause`) and return its answer, empty where it has none.

    Raises HypervisorError where the VMM refuses, answers nonsense or does not answer within 10 s, VmIOError where it is not there.
    """
    with sockets_for_libraries():
        import httpx

    content = b"" if body is None else json.dumps(body).encode()
    if len(content) > LARGEST_BODY:
        raise HypervisorError(
            f"VM {vm_name!r}: the request {endpoint!r} has {len(content)} bytes, and Cloud Hypervisor takes {LARGEST_BODY}",
            vm_name=vm_name,
        )
    transport = httpx.HTTPTransport(uds=str(socket_path), verify=False)
    try:
        with sockets_for_libraries(), httpx.Client(transport=transport, timeout=ANSWER_TIMEOUT_S, trust_env=False) as client:
            answer = client.request("GET" if ask else "PUT", f"http://localhost/api/v1/{endpoint}", content=content or None)
    except httpx.TimeoutException as error:
        raise HypervisorError(
            f"VM {vm_name!r}: Cloud Hypervisor did not answer {endpoint!r} within {ANSWER_TIMEOUT_S:g} s", vm_name=vm_name
        ) from error
    except httpx.ProtocolError as error:
        raise HypervisorError(
            f"VM {vm_name!r}: Cloud Hypervisor broke off its answer to {endpoint!r}: {error}", vm_name=vm_name
        ) from error
    except httpx.HTTPError as error:
        raise VmIOError(f"VM {vm_name!r}: Cloud Hypervisor cannot be reached for {endpoint!r}: {error}", vm_name=vm_name) from error
    if answer.status_code not in (200, 204):
        raise HypervisorError(
            f"VM {vm_name!r}: Cloud Hypervisor refused {endpoint!r} with status {answer.status_code}: {_reasons(answer.text)}",
            vm_name=vm_name,
        )
    try:
        value = answer.json() if answer.content else {}
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise HypervisorError(
            f"VM {vm_name!r}: Cloud Hypervisor's answer to {endpoint!r} makes no sense ({error}): {answer.text[:200]!r}",
            vm_name=vm_name,
        ) from error
    return value


def _reasons(text: str) -> str:
    try:
        reasons = json.loads(text)
    except (ValueError, RecursionError):
        return text[:500] or "no reason given"
    return ": ".join(str(reason) for reason in reasons) if isinstance(reasons, list) else text[:500]


def connect_vsock(vm_name: str, socket_path: Path, port: int) -> socket.socket:
    """Return a stream to a vsock port of the guest's; raises VmIOError where nothing listens there.

    Cloud Hypervisor's docs/vsock.md: connect, send `CONNECT PORT`, read `OK N`.
    """
    peer = Socket(socket.AF_UNIX)
    peer.settimeout(ANSWER_TIMEOUT_S)
    try:
        peer.connect(os.fspath(socket_path))
        peer.sendall(f"CONNECT {port}\n".encode())
        answer = b""
        # Byte by byte: what comes after the line is the guest's.
        while not answer.endswith(b"\n") and len(answer) < 32:
            byte = peer.recv(1)
            if not byte:
                break
            answer += byte
        if not re.fullmatch(rb"OK \d+\n", answer):
            raise VmIOError(f"VM {vm_name!r}: nothing in the guest listens at vsock port {port}", vm_name=vm_name)
    except OSError as error:
        peer.close()
        if isinstance(error, VmIOError):
            raise
        raise VmIOError(f"VM {vm_name!r}: vsock port {port} cannot be reached: {error}", vm_name=vm_name) from error
    peer.settimeout(None)
    return peer

"""A QEMU VM's state saved to a file and loaded from one: migration over QMP, to a file instead of another host.

Memory that is a file which source and destination share is not in the stream (capability `x-ignore-shared`): a save then takes
milliseconds, and a load maps the file copy-on-write.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pytest_chvm.drivers.keys import file_key
from pytest_chvm.drivers.qemu import qmp
from pytest_chvm.errors import HypervisorError

# A piece of work with a QMP client.
Work = Callable[[Any], Awaitable[None]]

SAVE_TIMEOUT_S = 60.0
# QEMU's own limit is meant for a network, and is also what a stopped VM's memory goes through.
MAX_BANDWIDTH = 1 << 40
LIST_TIMEOUT_S = 10.0


def firmware_key(binary: Path, names: Sequence[str]) -> list[str]:
    """Return the identity of the firmware of these names that a QEMU loads: a state saved with another cannot be loaded."""
    places = [Path(place) for place in _firmware_places(binary)]
    found = [next((place / name for place in places if (place / name).is_file()), None) for name in names]
    return [word for file in found if file is not None for word in file_key(file)]


@lru_cache(maxsize=8)
def _firmware_places(binary: Path) -> tuple[str, ...]:
    """Return the directories in which QEMU looks for firmware, in order."""
    try:
        done = subprocess.run([binary, "-L", "help"], capture_output=True, timeout=LIST_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        # The error of starting it says more.
        return ()
    return tuple(os.fsdecode(line) for line in done.stdout.splitlines())


def save(vm_name: str, socket_path: Path, state: Path, *, memory_is_shared: bool) -> None:
    """Write a stopped VM's state to a file, with its memory unless that is a shared file; raises HypervisorError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    _migrate(vm_name, socket_path, state, flags, "migrate", SAVE_TIMEOUT_S, memory_is_shared=memory_is_shared)


def load(vm_name: str, socket_path: Path, state: Path, timeout_s: float, *, memory_is_shared: bool, then: Work) -> None:
    """Have a QEMU that was started with `-incoming defer` take a state from a file, and go on with `then`; all in `timeout_s`.

    Raises HypervisorError.
    """
    flags = os.O_RDONLY
    _migrate(vm_name, socket_path, state, flags, "migrate-incoming", timeout_s, memory_is_shared=memory_is_shared, then=then)


def _migrate(
    vm_name: str,
    socket_path: Path,
    state: Path,
    flags: int,
    command: str,
    timeout_s: float,
    *,
    memory_is_shared: bool,
    then: Work | None = None,
) -> None:
    fd = os.open(state, flags | os.O_CLOEXEC, 0o600)
    try:
        capabilities = [{"capability": "x-ignore-shared", "state": memory_is_shared}, {"capability": "events", "state": True}]

        async def work(client: Any) -> None:
            from qemu.qmp import EventListener

            await client.execute("migrate-set-capabilities", {"capabilities": capabilities})
            await client.execute("migrate-set-parameters", {"max-bandwidth": MAX_BANDWIDTH})
            client.send_fd_scm(fd)
            await client.execute("getfd", {"fdname": "state"})
            ended = EventListener("MIGRATION", lambda event: _status(event) in ("completed", "failed"))
            with client.listen(ended):
                await client.execute(command, {"uri": "fd:state"})
                event = await qmp.next_event(client, ended)
            if command == "migrate":
                # The event comes a moment before QEMU accepts `cont`, and there is no event for that:
                # QEMU's own tests ask as well (`wait_migration` of its iotests).
                while (await client.execute("query-status"))["status"] == "finish-migrate":
                    pass
            if _status(event) == "failed":
                answer = await client.execute("query-migrate")
                raise HypervisorError(f"VM {vm_name!r}: {command!r} failed: {answer.get('error-desc', answer)}", vm_name=vm_name)
            if then is not None:
                await then(client)

        qmp.session(vm_name, socket_path, work, timeout_s=timeout_s, overdue=f"QEMU did not end {command!r}")
    finally:
        os.close(fd)


def _status(event: Any) -> object:
    return event["data"].get("status")

"""A guest's memory as an ELF core, written by QEMU over QMP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pytest_chvm.drivers.qemu import qmp
from pytest_chvm.errors import HypervisorError, VmIOError

# Of a large guest it is as long as the host's disk takes.
TIMEOUT_S = 600.0


def dump(vm_name: str, socket_path: Path, target: Path) -> None:
    """Write the memory of a VM to a new file; the guest stands still meanwhile. Raises HypervisorError, VmIOError for the file."""
    try:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise VmIOError(
            f"VM {vm_name!r}: its memory cannot be written to {str(target)!r}: {error.strerror}", vm_name=vm_name
        ) from error

    async def work(client: Any) -> None:
        from qemu.qmp import EventListener

        client.send_fd_scm(fd)
        await client.execute("getfd", {"fdname": "dump"})
        ended = EventListener("DUMP_COMPLETED")
        with client.listen(ended):
            await client.execute("dump-guest-memory", {"paging": False, "protocol": "fd:dump", "detach": True})
            event = await qmp.next_event(client, ended)
        if (why := event["data"].get("error")) is not None:
            raise HypervisorError(f"VM {vm_name!r}: QEMU could not write its memory to {str(target)!r}: {why}", vm_name=vm_name)

    try:
        qmp.session(vm_name, socket_path, work, timeout_s=TIMEOUT_S, overdue="QEMU did not write its memory")
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)

"""A guest's memory as an ELF core, written by Cloud Hypervisor: its docs/coredump.md. Its releases are built without that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pytest_chvm.drivers.cloud_hypervisor.parts import DEBUG_BUILD
from pytest_chvm.errors import HypervisorError, UnsupportedError

# Calls an endpoint with a body.
Call = Callable[[str, dict[str, object] | None], object]


def dump(vm_name: str, call: Call, target: Path, *, paused: bool) -> None:
    """Write the memory of a VM to a new file; it has to be paused for that, and goes on afterwards where it was not.

    Raises UnsupportedError where it was built without, HypervisorError for what else it refuses.
    """
    if not paused:
        call("vm.pause", None)
    try:
        call("vm.coredump", {"destination_url": target.as_uri()})
    except HypervisorError as error:
        # Of an endpoint that it does not have.
        if "with status 404" not in str(error):
            raise
        raise UnsupportedError(
            f"VM {vm_name!r}: this cloud-hypervisor was built without vm.coredump, which writes a guest's memory to a file: "
            f"{DEBUG_BUILD}, or use another VMM (--chvm-vmm)",
            vm_name=vm_name,
        ) from error
    finally:
        if not paused:
            call("vm.resume", None)

"""The machines of the tests: a logbox server on the code of this checkout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_chvm import Settings, Vm, VmFactory
from pytest_chvm.guest.kernels.kernel import inspect_kernel
from pytest_chvm.guest.kernels.modules import modules_in_order
from pytest_chvm.machine.guest_choice import built_in_kernel

PORT = 5140
GUEST_PROGRAMS = Path(__file__).parents[1] / "logbox" / "guest"
# In the built-in guest, shared dirs are mounted at /mnt/<tag>: what is tested is the checkout, without a build or a copy.
SHARED = {"logbox": GUEST_PROGRAMS}


@pytest.fixture
def data_disk(tmp_path: Path) -> Path:
    """An empty disk of 16 MiB, which keeps what a guest writes to it."""
    disk = tmp_path / "data.raw"
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    return disk


@pytest.fixture
def boot_box(chvm_vm: VmFactory, data_disk: Path) -> Callable[[], Vm]:
    """Boots a logbox server on the test's data disk; called again after the first is gone, it finds what that one left."""

    def boot() -> Vm:
        vm = chvm_vm(shared_dirs=SHARED, data_disk=data_disk)
        vm.check_output(f"/mnt/logbox/logbox-volume /dev/vda /data && /mnt/logbox/logboxd /data {PORT}")
        return vm

    return boot


@pytest.fixture(scope="session")
def shared_vm(chvm_vm_factory: VmFactory) -> Vm:
    """One VM for all tests that leave it as it was."""
    return chvm_vm_factory(name="shared", shared_dirs=SHARED)


@pytest.fixture
def small_volume(shared_vm: Vm) -> Iterator[str]:
    """A tmpfs of 32 KiB in the shared VM, with a server on it."""
    shared_vm.check_output(f"mkdir -p /small && mount -t tmpfs -o size=32k small /small && /mnt/logbox/logboxd /small {PORT}")
    yield "/small"
    # Until it is gone: the next server takes the same port.
    shared_vm.check_output("killall nc; while pidof nc; do usleep 10000; done; umount -l /small")


@pytest.fixture(scope="session")
def dummy_module(shared_vm: Vm, chvm_kernel: Path | None, chvm_settings: Settings) -> str:
    """The kernel's module `dummy`, loaded into the shared VM from the tree that came with its kernel."""
    kernel = inspect_kernel(chvm_kernel) if chvm_kernel else built_in_kernel(chvm_settings)
    assert kernel.modules_dir, f"there are no modules for the kernel {kernel.image}"
    # With what it depends on, each after that; none where it is built in.
    for module in modules_in_order(kernel.modules_dir, ["dummy"]):
        shared_vm.check_output(f"cat >/tmp/{module.name}.ko && insmod /tmp/{module.name}.ko", input=module.data)
    return "dummy"

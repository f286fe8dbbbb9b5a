"""What a test's marker says that it needs of its kernel (`kernel_config`, `kernel_min`): it is skipped where that is not so.

Registered as a plugin of its own in a run that has such tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_chvm.plugin.keys import settings_key
from pytest_chvm.plugin.marker import marker_arguments
from pytest_chvm.plugin.run import begin_host

if TYPE_CHECKING:
    from pytest_chvm.guest.kernels.config import KernelNeeds
    from pytest_chvm.guest.kernels.kernel import Kernel
    from pytest_chvm.machine.vm import Vm


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose kernel is not what its marker asks for."""
    check_kernel(item)


def check_kernel(item: pytest.Item) -> None:
    """Skip a test whose kernel is not what its marker asks for, as far as that is known before a VM is booted.

    Raises InvalidConfigError for what no kernel could have, MissingRequirementError where nothing says how it was configured.
    """
    if not (needs := _needs(item)) or (kernel := _kernel_of(item)) is None:
        return
    if kernel.release is not None:
        _skip_if(needs.why_not_version(kernel.release))
    if not needs.options:
        return
    from pytest_chvm.errors import MissingRequirementError
    from pytest_chvm.guest.kernels.config import config_of

    if (config := config_of(kernel)) is None:
        raise MissingRequirementError(
            f"{item.nodeid} needs kernel_config={list(needs.options)!r}, and how the kernel {str(kernel.file)!r} was configured "
            f"is not known: it does not have its configuration in itself (CONFIG_IKCONFIG), and beside it is neither "
            f"config-{kernel.release} nor a .config; put one there"
        )
    _skip_if(needs.why_not_config(config))


def check_kernel_of(item: pytest.Item, vm: Vm) -> None:
    """Skip a test whose VM, of an image with a kernel of its own, does not run such a kernel."""
    if not (needs := _needs(item)) or _kernel_of(item) is not None:
        return
    _skip_if(needs.why_not_version(vm.kernel.release))
    if needs.options:
        _skip_if(needs.why_not_config(vm.kernel.config))


def _needs(item: pytest.Item) -> KernelNeeds | None:
    given = marker_arguments(item)
    if given.get("kernel_config") is None and given.get("kernel_min") is None:
        return None
    from pytest_chvm.guest.kernels.config import KernelNeeds

    return KernelNeeds.checked(given.get("kernel_config"), given.get("kernel_min"))


def _skip_if(why: str | None) -> None:
    if why is not None:
        pytest.skip(why)


def _kernel_of(item: pytest.Item) -> Kernel | None:
    """Return the kernel that a test's VMs boot, where its markers and the options say it; None where their image does."""
    from pytest_chvm.guest.kernels.find import find_kernel
    from pytest_chvm.machine.guest_choice import built_in_kernel, cache_dir
    from pytest_chvm.model import architecture
    from pytest_chvm.model.values import as_kernel

    settings = item.config.stash[settings_key]
    given = marker_arguments(item)
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    image = given.get("kernel") or parameters.get("chvm_kernel") or (settings.kernel[0] if settings.kernel else None)
    if image is not None:
        progress, arch = begin_host(item.config).show_progress, architecture(given.get("arch"))
        return find_kernel(as_kernel("kernel", image), cache_dir(settings), progress, arch)
    if given.get("root_disk") or (settings.root_disk and not {"initramfs", "root"} & given.keys()):
        return None
    return built_in_kernel(settings, begin_host(item.config).show_progress, architecture(given.get("arch")))

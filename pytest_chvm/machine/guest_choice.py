"""Which guest a VM boots: the built-in one, where its config names none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_chvm.base.cache import default_cache_dir
from pytest_chvm.base.progress import Progress, show_progress
from pytest_chvm.drivers.disks import default_cmdline
from pytest_chvm.drivers.preflight import preflight
from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.guest.choice import guest_of
from pytest_chvm.guest.kernels.default import default_kernel
from pytest_chvm.guest.kernels.find import find_kernel
from pytest_chvm.guest.kernels.kernel import Kernel
from pytest_chvm.guest.kernels.unpacked import unpacked_kernel
from pytest_chvm.guest.kinds import Guest
from pytest_chvm.model import Architecture, VmConfig, architecture
from pytest_chvm.settings import Settings

if TYPE_CHECKING:
    from pytest_chvm.guest.images.inspect import System

# Returns the system on a config's root disk, and the directory that has its kernel and modules. It looks for it with the kernel of
# the built-in guest, which it asks for where it has not looked before.
InspectBy = Callable[[Callable[[], Kernel], VmConfig], "tuple[System, Path]"]


def choose_guest(
    config: VmConfig, settings: Settings, progress: Progress = show_progress, *, inspect: InspectBy | None = None
) -> Guest:
    """Return the guest that a config asks for, complete; see `pytest_chvm.guest.choice.guest_of`.

    This is where `preflight` is asked, as soon as there is a kernel. Raises what both do, and InvalidConfigError for two roots.
    """
    if config.root is not None and config.initramfs is not None:
        raise InvalidConfigError(
            f"VM {config.name!r}: root='host' and an initramfs, and the guest's is the built-in one: leave one of them out",
            vm_name=config.name,
        )
    kernel, is_named = _kernel(config, settings, progress), config.kernel is not None
    if kernel is not None:
        config = config.replace(kernel=kernel.image if is_named else unpacked_kernel(kernel.image, cache_dir(settings)))
    look = None
    if inspect is not None and config.root_disk is not None and config.firmware is None:
        look = partial(inspect, partial(built_in_kernel, settings, progress, config.architecture))
    preflight(config)
    guest = guest_of(config, kernel, cache_dir(settings), progress, look, kernel_is_named=is_named)
    extra = guest.config.cmdline_extra
    if not extra:
        return guest
    cmdline = default_cmdline(guest.config) if guest.config.cmdline is None else guest.config.cmdline
    return replace(guest, config=guest.config.replace(cmdline=f"{cmdline} {extra}".strip(), cmdline_extra=None))


def _kernel(config: VmConfig, settings: Settings, progress: Progress) -> Kernel | None:
    """Return the kernel that a config names, else the built-in guest's; None where firmware looks for it."""
    if config.firmware is not None:
        return None
    if config.kernel is None:
        return built_in_kernel(settings, progress, config.architecture)
    try:
        return find_kernel(config.kernel, cache_dir(settings), progress, config.architecture)
    except InvalidConfigError as error:
        raise type(error)(f"VM {config.name!r}: {error}", vm_name=config.name) from error


def cache_dir(settings: Settings) -> Path:
    """Return where built guests and fetched kernels are kept."""
    return settings.cache_dir or default_cache_dir()


def built_in_kernel(settings: Settings, progress: Progress = show_progress, arch: Architecture | None = None) -> Kernel:
    """Return the built-in guest's kernel, fetched at the first call; raises InvalidConfigError where there is none.

    `arch` is its architecture (None: this machine's).
    """
    return _built_in_kernel(cache_dir(settings), arch or architecture(None), progress)


@lru_cache(maxsize=4)
def _built_in_kernel(cache: Path, arch: Architecture, progress: Progress) -> Kernel:
    return default_kernel(cache, arch, progress)

"""The guest that a config asks for, made complete: its kernel, initramfs and command line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_chvm.base.progress import Progress
from pytest_chvm.base.text import as_one_word
from pytest_chvm.base.untouched import random_hex
from pytest_chvm.errors import InvalidConfigError, MissingRequirementError
from pytest_chvm.guest.drivers import modules_for
from pytest_chvm.guest.initramfs import WANTED_MODULES, add_words, build_initramfs, find_busybox
from pytest_chvm.guest.kernels.image import check_kernel_image
from pytest_chvm.guest.kernels.kernel import Kernel, inspect_kernel
from pytest_chvm.guest.kernels.module_tree import ALIAS_FILE, module_image
from pytest_chvm.guest.kernels.modules import modules_of
from pytest_chvm.guest.kernels.unpacked import unpacked_kernel
from pytest_chvm.guest.kinds import Guest
from pytest_chvm.guest.kinds.built_in import BuiltInGuest
from pytest_chvm.model import Architecture, HostRoot, VmConfig, plugged_into_clones
from pytest_chvm.model.seeds import SEED_FIELDS

# What only one kind of guest needs is imported with it: each process that starts a VM would wait for it.
if TYPE_CHECKING:
    from pytest_chvm.guest.images.inspect import System
    from pytest_chvm.guest.kinds.stock import StockGuest

# What a throwaway VM can do without, for the built-in kernel: console messages that are no warnings (the serial port is slow),
# guards against attacks from its own programs, tests of the crypto code, waiting long for grace periods. Beside these there are
# words of the architecture's.
QUICK_WORDS = "loglevel=5 mitigations=off nokaslr cryptomgr.notests rcupdate.rcu_expedited=1 random.trust_cpu=on"
NAMES_CONSOLE = re.compile(r"(?:^|\s)(?:console=|earlyprintk|earlycon)")

# Returns the system on a config's root disk, and the directory that has its kernel and modules.
Inspect = Callable[[VmConfig], "tuple[System, Path]"]


def guest_of(
    config: VmConfig, kernel: Kernel | None, cache: Path, progress: Progress, inspect: Inspect | None, *, kernel_is_named: bool
) -> Guest:
    """Return the guest that a config asks for, complete; `kernel` is the one that it names, or else the built-in guest's.

    An initramfs of its own, or a root disk with a kernel and a command line, is an image prepared by the user; a root disk without
    is a stock image, whose system `inspect` looks for; the rest is the built-in guest. Raises InvalidConfigError where it cannot be
    had, and what `inspect` does.
    """
    is_image = config.initramfs is not None or config.root_disk is not None or config.firmware is not None
    if config.modules and is_image:
        raise InvalidConfigError(
            f"VM {config.name!r}: modules={list(config.modules)}, which the built-in guest loads, and an image loads its own: run "
            "modprobe in it, or name them in its /etc/modules-load.d",
            vm_name=config.name,
        )
    # Not a check of the config's own: a complete one has both.
    if config.firmware is not None:
        return _firmware_guest(config, cache, progress)
    assert kernel is not None
    prepared = config.initramfs is not None or (kernel_is_named and config.cmdline is not None)
    if config.root_disk is not None and inspect is not None and not prepared:
        return _stock_guest(config, kernel if kernel_is_named else None, cache, progress, inspect)
    if config.initramfs is not None or config.root_disk is not None:
        return _image_guest(config, kernel)
    arch = config.architecture
    return _built_in_guest(config, kernel, arch.console_word if kernel_is_named else built_in_cmdline(arch), cache, progress)


def _image_guest(config: VmConfig, kernel: Kernel | None = None) -> Guest:
    from pytest_chvm.guest.kinds.image import ImageGuest

    return ImageGuest(config, kernel=kernel)


def _built_in_guest(config: VmConfig, kernel: Kernel, cmdline: str, cache: Path, progress: Progress) -> BuiltInGuest:
    kind: type[BuiltInGuest] = BuiltInGuest
    if config.root is not None:
        from pytest_chvm.guest.kinds.host_root import HostRootGuest

        kind = HostRootGuest
        root = HostRoot() if config.root == "host" else config.root
        config = config.replace(shared_dirs=[root.share(), *config.shared_dirs])
    initramfs = _built_in_initramfs(kernel, cache, progress, kind, modules_for(config))
    if isinstance(config.root, HostRoot) and config.root.resident is not None:
        from pytest_chvm.guest.resident import add_resident

        initramfs = add_resident(initramfs, config.root.resident, cache, progress)
    cmdline = cmdline if config.cmdline is None else config.cmdline
    disk = _modules_disk(kernel, cache, progress)
    load_words = _load_words(config, kernel, disk)
    plugs_disks = bool(plugged_into_clones(config.all_disks))
    config = config.replace(initramfs=initramfs, cmdline=cmdline)
    return kind(
        config, random_hex(8), _lacks(kernel), kernel=kernel, modules_disk=disk, load_words=load_words, plugs_disks=plugs_disks
    )


@lru_cache(maxsize=16)
def _modules_disk(kernel: Kernel, cache: Path, progress: Progress) -> Path | None:
    if kernel.modules_dir is None or kernel.release is None:
        return None
    try:
        return module_image(kernel, find_busybox(cache, progress), cache, progress)
    except MissingRequirementError as error:
        progress(str(error))
        return None


def _load_words(config: VmConfig, kernel: Kernel, disk: Path | None) -> tuple[str, ...]:
    """Return what the guest is told of the modules that it is to load; raises InvalidConfigError for one that its kernel lacks."""
    if not config.modules:
        return ()
    from pytest_chvm.guest.kernels.module_names import modules_to_load

    try:
        if disk is None:
            why = _lacks(kernel) or "no disk with its modules, for want of mke2fs (package e2fsprogs)"
            raise MissingRequirementError(f"modules={list(config.modules)}, and the kernel has {why}")
        wanted = modules_to_load(config.modules, kernel, disk.with_name(ALIAS_FILE))
    except InvalidConfigError as error:
        raise type(error)(f"VM {config.name!r}: {error}", vm_name=config.name) from None
    return tuple(f"chvm.load={place},{as_one_word(module)}" for place, module in wanted.items())


def _firmware_guest(config: VmConfig, cache: Path, progress: Progress) -> Guest:
    """Return the guest of an image that its own boot loader boots; with a seed of its own nothing of ours gets into it."""
    if config.root_disk is None:
        raise InvalidConfigError(f"VM {config.name!r}: firmware='uefi' boots what is on a root_disk: name one", vm_name=config.name)
    if config.seed_iso is not None:
        return _image_guest(config)
    from pytest_chvm.guest.kinds.firmware import FirmwareGuest

    return FirmwareGuest(config, random_hex(8), busybox=find_busybox(cache, progress, config.architecture))


def _stock_guest(config: VmConfig, kernel: Kernel | None, cache: Path, progress: Progress, inspect: Inspect) -> StockGuest:
    """Return the guest of a stock image, with a kernel that the config names (None: the image's own)."""
    from pytest_chvm.guest.images.inspect import KERNEL_FILE
    from pytest_chvm.guest.kinds.stock import StockGuest

    system, directory = inspect(config)
    image = directory / KERNEL_FILE
    if kernel is None and not image.exists():
        raise InvalidConfigError(
            f"VM {config.name!r}: root_disk {str(config.root_disk)!r} has a system on {system.device} and no kernel, neither in "
            "/boot nor beside its modules: name one with kernel=PATH",
            vm_name=config.name,
        )
    if not system.cloud_init:
        _refuse_seed(config)
    known = kernel or inspect_kernel(image)
    # One that was copied out of the image has its modules there.
    if kernel is None or known.modules_dir is None:
        known = replace(known, modules_dir=modules_of(directory, known.release))
    initramfs = _initramfs_in_front(system, known, cache, progress)
    cmdline = config.cmdline
    if cmdline is None:
        cmdline = f"{system.cmdline} {config.architecture.console_word}{_less_said(system.cmdline)}"
    config = config.replace(kernel=unpacked_kernel(known.image, cache), initramfs=initramfs, cmdline=cmdline)
    return StockGuest(config, random_hex(8), None if kernel is None else _lacks(known), kernel=known)


def _refuse_seed(config: VmConfig) -> None:
    given = ", ".join(field for field, name in SEED_FIELDS.items() if name in config.seed_texts)
    if given:
        raise InvalidConfigError(
            f"VM {config.name!r}: {given} is for an image's cloud-init, and root_disk {str(config.root_disk)!r} has none, neither "
            "/etc/cloud nor /usr/bin/cloud-init: nothing in it would read that. Leave it out, or take an image that has cloud-init "
            "('chvm guest build debian' makes one); what else reads a seed gets it by seed_iso=",
            vm_name=config.name,
        )


def _less_said(cmdline: str) -> str:
    """Return what keeps an image's kernel and its systemd from telling all that they do on the serial console.

    That is emulated byte by byte, and most of a boot's time where the VMM is run by software. Warnings are printed nevertheless
    (kernel-parameters.txt), and so is what systemd says of units that fail (`quiet` in systemd(1)).
    """
    chosen = re.search(r"(?:^|\s)(quiet|debug|loglevel=|ignore_loglevel|systemd\.show_status=|systemd\.log_)", cmdline)
    return "" if chosen else " quiet loglevel=5"


def _lacks(kernel: Kernel) -> str | None:
    if kernel.modules_dir is not None:
        return None
    if kernel.release is None:
        return f"no modules, since the release of the kernel {str(kernel.file)!r} cannot be told"
    return (
        f"no modules for {kernel.release} beside this kernel ({kernel.file}): expected in lib/modules/{kernel.release} beside its "
        "directory, or of the host. Name the kernel where its package has it, or one that has these drivers built in"
    )


def told_config(guest: Guest, words: Sequence[str], directory: Path) -> VmConfig:
    """Return the config of a guest that is told these words, on its kernel command line behind the user's own.

    The built-in guest is told them by a file of its initramfs, made in `directory`, where the kernel would cut them off. Raises
    InvalidConfigError where there is no other way.
    """
    if (told := guest.told_otherwise(words, directory)) is not None:
        return told
    config = guest.config
    own = config.cmdline
    cmdline = " ".join([*([own] if own else []), *words]) or own
    if (image := config.kernel_image) is None:
        # By firmware there is no way to tell it more than its own seed does.
        return config
    arch = config.architecture
    room = check_kernel_image(image, arch.name).cmdline_bytes
    size, own_size = len(os.fsencode(cmdline or "")), len(os.fsencode(own or ""))
    if size <= room:
        return config.replace(cmdline=_with_early_console(cmdline, room, arch))
    if guest.reads_words_of_file and config.initramfs is not None and own_size <= room:
        return config.replace(initramfs=add_words(config.initramfs, words, directory / "initramfs"))
    raise InvalidConfigError(
        f"VM {config.name!r}: the kernel command line has {size} bytes, {own_size} of yours and {size - own_size} that its "
        f"networks need, and this kernel takes {room} and cuts off the rest: shorten it by {size - room}",
        vm_name=config.name,
    )


def built_in_cmdline(arch: Architecture) -> str:
    """Return the command line of the built-in guest with the built-in kernel."""
    return " ".join(words for words in (arch.console_word, QUICK_WORDS, arch.quick_words) if words)


def _with_early_console(cmdline: str | None, room: int, arch: Architecture) -> str | None:
    """Return a command line with which a panic is on the serial port where no console is named: nothing else would tell of it."""
    if cmdline is None or NAMES_CONSOLE.search(cmdline):
        return cmdline
    longer = f"{cmdline} {arch.early_console}".strip()
    return longer if len(os.fsencode(longer)) <= room else cmdline


@lru_cache(maxsize=16)
def _built_in_initramfs(
    kernel: Kernel, cache: Path, progress: Progress, kind: type[BuiltInGuest], of_config: tuple[str, ...]
) -> Path:
    more = kind.more_files(kernel, cache, progress)
    return build_initramfs(kernel, cache, progress, wanted=(*WANTED_MODULES, *kind.more_modules, *of_config), more=more)


@lru_cache(maxsize=16)
def _initramfs_in_front(system: System, kernel: Kernel, cache: Path, progress: Progress) -> Path:
    from pytest_chvm.guest.images.initramfs import initramfs_in_front

    return initramfs_in_front(system, kernel, cache, progress)

"""Checks of the options, made once at the start of a run that has VM tests.

Nothing is started here, but a kernel may be fetched. A test's own arguments are checked when its VM is launched.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pytest_chvm.base.progress import Progress
from pytest_chvm.errors import InvalidConfigError, MissingRequirementError
from pytest_chvm.guest.kernels.find import find_kernel
from pytest_chvm.host.networks.subnets import parse_pool
from pytest_chvm.machine.guest_choice import cache_dir
from pytest_chvm.model import VmConfig
from pytest_chvm.settings import OPTIONS_BY_NAME, Settings

Value = TypeVar("Value")


def check_options(settings: Settings, default_artifacts: Path, progress: Progress) -> None:
    """Raise InvalidConfigError, naming the option, for the first one that no VM could be started with. Kernels are fetched."""
    for kernel in settings.kernel:
        try:
            _check("kernel", kernel, _there)
            _check("kernel", kernel, lambda name: find_kernel(name, cache_dir(settings), progress))
        except MissingRequirementError:
            # Its tests are skipped, with the reason.
            if settings.missing != "skip":
                raise
    _check("initramfs", settings.initramfs, _readable)
    _check("root_disk", settings.root_disk, _readable)
    _check("binary", settings.binary, _executable)
    _check("virtiofsd", settings.virtiofsd, _executable)
    _check("cmdline", settings.cmdline, lambda cmdline: VmConfig(cmdline=cmdline))
    _check("subnet_pool", settings.subnet_pool, parse_pool)
    _check("cache_dir", settings.cache_dir, _can_be_directory)
    if settings.keep != "never":
        _check("artifacts", settings.artifacts or default_artifacts, _writable_directory)


def _check(name: str, value: Value | None, check: Callable[[Value], object]) -> None:
    if value is None:
        return
    option = OPTIONS_BY_NAME[name]
    try:
        check(value)
    except InvalidConfigError as error:
        raise type(error)(f"{option.flag} ({option.variable}, {option.ini_key}): {error}") from error


def _there(kernel: Path) -> None:
    # A word for a kernel is a relative path.
    if kernel.is_absolute() and not kernel.exists():
        raise MissingRequirementError(f"{str(kernel)!r} does not exist")


def _readable(file: Path) -> None:
    if not file.exists():
        raise InvalidConfigError(f"{str(file)!r} does not exist")
    if file.is_dir():
        raise InvalidConfigError(f"{str(file)!r} is a directory, expected a file")
    if not os.access(file, os.R_OK):
        raise InvalidConfigError(f"{str(file)!r} cannot be read by you")


def _executable(file: Path) -> None:
    _readable(file)
    if not os.access(file, os.X_OK):
        raise InvalidConfigError(f"{str(file)!r} is not executable")


def _can_be_directory(directory: Path) -> Path:
    """Return the directory, or the one above it in which it would be made."""
    there = next(place for place in (directory, *directory.parents) if place.exists())
    if not there.is_dir():
        raise InvalidConfigError(f"{str(directory)!r} cannot be a directory: {str(there)!r} is a file")
    return there


def _writable_directory(directory: Path) -> None:
    there = _can_be_directory(directory)
    if not os.access(there, os.W_OK | os.X_OK):
        raise InvalidConfigError(f"{str(there)!r} cannot be written by you, and the logs are to be kept in {str(directory)!r}")

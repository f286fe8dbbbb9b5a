"""The options: on the command line, in the environment and in the configuration file."""

from __future__ import annotations

import os
from typing import Any

import pytest

from pytest_chvm.base.choices import is_kernel_word
from pytest_chvm.base.untouched import random_hex
from pytest_chvm.plugin.keys import KSELFTEST, KUNIT, factories_key, failures_key, making_key, pid_key, run_key, settings_key
from pytest_chvm.plugin.run import claim_default_host
from pytest_chvm.settings import OPTIONS, Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add every option, on the command line and as ini key."""
    group = parser.getgroup("chvm", "virtual machines (pytest-chvm)")
    for option in OPTIONS:
        group.addoption(
            option.flag,
            dest=option.ini_key,
            action="append" if option.many else "store",
            default=None,
            metavar=option.metavar,
            choices=option.choices or None,
            help=f"{option.help} [{option.variable}]".replace("%", "%%"),
        )
        kind: Any = "linelist" if option.many else "string"
        if option.number is not None:
            kind = _number_kind(option.number)
        parser.addini(option.ini_key, option.help, type=kind, default=None)
    for dest, metavar, text in (
        (
            KSELFTEST,
            "DIR",
            "run the programs of a target of kselftest, TREE/tools/testing/selftests/TARGET, each in a VM with the host's files",
        ),
        (KUNIT, "MODULE", "run the KUnit tests of a kernel module (a path), or those built into the kernel (boot), in a VM"),
    ):
        group.addoption(f"--{dest.replace('_', '-')}", dest=dest, action="append", default=[], metavar=metavar, help=text)


def _number_kind(number: type[int | float]) -> Any:
    """Return the type of a number in a configuration file: from 9 on pytest takes a TOML file's own, and insists on the type."""
    if pytest.version_tuple >= (9, 2):
        # Values of INI files are strings, which we convert.
        return str | int | float if number is float else str | int
    if pytest.version_tuple >= (9,):
        return number.__name__
    return "string"


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker and resolve the options."""
    config.addinivalue_line(
        "markers", "chvm(**config): arguments of chvm_vm for this test; every test that uses a VM has this marker"
    )
    config.stash[factories_key] = []
    config.stash[failures_key] = []
    config.stash[making_key] = []
    config.stash[pid_key] = os.getpid()
    config.stash[run_key] = random_hex(8)
    claim_default_host(config)
    command_line = {option.name: config.getoption(option.ini_key) for option in OPTIONS}
    try:
        config.stash[settings_key] = Settings.resolve(command_line, ini=_ini_values(config))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def _ini_values(config: pytest.Config) -> dict[str, Any]:
    """Return the ini keys that are set; relative paths are relative to the configuration file."""
    base = config.inipath.parent if config.inipath else config.rootpath
    values: dict[str, Any] = {}
    for option in OPTIONS:
        try:
            value = config.getini(option.ini_key)
        except (ValueError, TypeError) as error:
            # Before 9.2 pytest's error does not name the key of an invalid number.
            raise ValueError(f"{option.ini_key}: {error}") from error
        if value and option.is_path:
            given = value if option.many else [value]
            texts = [text if text.startswith("~") or is_kernel_word(text) else str(base / text) for text in given]
            value = texts if option.many else texts[0]
        values[option.ini_key] = value
    return values

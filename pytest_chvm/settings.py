"""The options: `Settings`, a frozen data class whose fields are all of them, and which they are resolved into once.

Read by every pytest run on the machine, so nothing heavy is imported at the top.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

from pytest_chvm.base.choices import Accel, BootWay, NetworkMode, Vmm, is_kernel_word, split_kernels


@dataclass(frozen=True, slots=True)
class Option:
    """One option: `--chvm-NAME`, `CHVM_NAME` and the ini key `chvm_name`.

    `convert` takes the text and raises ValueError with what was expected. `many`: it may be given several times.
    """

    name: str
    convert: Callable[[str], object]
    default: object
    help: str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    many: bool = False

    @property
    def flag(self) -> str:
        """The command line's spelling."""
        return f"--chvm-{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        """The environment's spelling."""
        return f"CHVM_{self.name.upper()}"

    @property
    def ini_key(self) -> str:
        """The configuration file's spelling."""
        return f"chvm_{self.name}"

    @property
    def is_path(self) -> bool:
        """Whether its values are paths: in a configuration file they are relative to that."""
        return self.convert in (_path, _kernel)

    @property
    def number(self) -> type[int | float] | None:
        """The type of its values where they are numbers, which a configuration file may have too."""
        return int if self.convert is count else float if self.convert is seconds else None

    def parse(self, text: str, source: str) -> object:
        """Return the value of a text; raises InvalidConfigError naming where it is from."""
        from pytest_chvm.errors import InvalidConfigError

        try:
            return self.convert(text)
        except ValueError as error:
            raise InvalidConfigError(f"{source}={text!r}: {error}") from error


def _path(text: str) -> Path:
    if not text:
        raise ValueError("expected a path")
    expanded = os.path.expanduser(text)
    if text.startswith("~") and not Path(expanded).is_absolute():
        raise ValueError("there is no home directory for '~': HOME is not set to an absolute path, or there is no such user")
    return Path(os.path.abspath(expanded))


def _kernel(text: str) -> Path:
    return Path(text) if is_kernel_word(text) else _path(text)


def count(text: str) -> int:
    """Return a whole number of 1 or more; raises ValueError with what was expected."""
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise ValueError("expected a whole number of 1 or more")
    return number


def seconds(text: str) -> float:
    """Return a number of seconds above 0; raises ValueError with what was expected."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise ValueError("expected a number of seconds above 0")
    return number


def _marker(text: str) -> str:
    if not text.isascii() or not text.isprintable() or not text or " " in text or len(text) > 64:
        raise ValueError("expected one word of at most 64 printable ASCII characters")
    return text


def _one_of(*choices: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return text

    return convert


def _option(
    convert: Callable[[str], object],
    default: object,
    help: str,
    metavar: str | None = None,
    *,
    choices: tuple[str, ...] = (),
    many: bool = False,
) -> Any:
    return field(default=default, metadata={"convert": convert, "help": help, "metavar": metavar, "choices": choices, "many": many})


def _choice(choices: tuple[str, ...], help: str) -> Any:
    return _option(_one_of(*choices), choices[0], help, choices=choices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the options resolved to, a field each. `boot_timeout` is seconds, `memory_mb` MiB; `kernel` may be several."""

    kernel: tuple[Path, ...] = _option(
        _kernel,
        (),
        "guest kernel: an image, a build tree, a directory with one, 'host', or a package like debian:6.1; repeat it to run every "
        "VM test once per kernel",
        "KERNEL",
        many=True,
    )
    initramfs: Path | None = _option(_path, None, "guest initramfs (default: the built-in guest)", "PATH")
    root_disk: Path | None = _option(_path, None, "guest root disk, never written", "PATH")
    cmdline: str | None = _option(str, None, "guest kernel command line", "TEXT")
    cpus: int = _option(count, 1, "processors of a VM (default: 1)", "N")
    memory_mb: int = _option(count, 256, "memory of a VM in MiB (default: 256)", "N")
    boot_timeout: float = _option(seconds, 60.0, "seconds from the start of the VMM to ready (default: 60)", "SECONDS")
    ready_marker: str = _option(_marker, "CHVM_READY", "word before the guest's IP on its serial console", "WORD")
    vmm: str = _choice(get_args(Vmm), "VMM (default: auto: Cloud Hypervisor where it and KVM are, else QEMU)")
    accel: str = _choice(get_args(Accel), "how QEMU runs guests (default: auto: KVM where it works, else in software)")
    network: str = _choice(get_args(NetworkMode), "network of a VM (default: auto: a TAP where one can be made)")
    boot: str = _choice(get_args(BootWay), "whether a VM may be a copy of a booted one (default: auto)")
    kernel_splat: str = _choice(("warn", "fail", "ignore"), "what a test does when a guest's kernel reports a bug (default: warn)")
    missing: str = _choice(("fail", "skip"), "what a test does when a VM cannot be had on this machine (default: fail)")
    keep: str = _choice(("never", "failed", "always"), "whose logs to keep below --chvm-artifacts (default: never)")
    core: str = _choice(("never", "failed"), "whether --chvm-keep keeps the memory of a failed test's VMs too (default: never)")
    artifacts: Path | None = _option(_path, None, "directory for the logs that --chvm-keep keeps (default: chvm-artifacts)", "DIR")
    max_vms: int | None = _option(count, None, "VMs that may run at once, of all runs on the machine (default: any number)", "N")
    memory_budget_mb: int | None = _option(
        count, None, "MiB that all VMs of the machine may have at once (default: nine tenths)", "N"
    )
    binary: Path | None = _option(_path, None, "the VMM's executable", "PATH")
    virtiofsd: Path | None = _option(_path, None, "the executable that serves shared dirs", "PATH")
    subnet_pool: str = _option(str, "198.18.0.0/15", "network that VM subnets are cut from (default: 198.18.0.0/15)", "CIDR")
    cache_dir: Path | None = _option(_path, None, "where built guests and fetched kernels are kept", "DIR")

    @classmethod
    def resolve(
        cls,
        command_line: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
        ini: Mapping[str, str | int | float | Sequence[str]] | None = None,
    ) -> Settings:
        """Return the settings: command line, else environment (default: the process's own), else ini, else default.

        An empty environment variable or ini value is one that is not set. Raises InvalidConfigError for a value that cannot be.
        """
        given = os.environ if environment is None else environment
        values: dict[str, Any] = {}
        for option in OPTIONS:
            value = (command_line or {}).get(option.name)
            source = option.flag
            if value is None and given.get(option.variable):
                text = given[option.variable]
                value = split_kernels(text) if option.many else text
                source = option.variable
            # A TOML file's number counts as set, also 0.
            if value is None and (ini or {}).get(option.ini_key) not in (None, "", []):
                value = (ini or {})[option.ini_key]
                source = option.ini_key
            values[option.name] = option.default if value is None else _parsed(option, value, source)
        return cls(**values)

    def with_arguments(self, arguments: Mapping[str, object]) -> Settings:
        """Return the settings with those launch arguments (`vmm`, `boot_timeout`...) that are not None in their places.

        Raises InvalidConfigError for a value that cannot be.
        """
        changes: dict[str, Any] = {}
        for name, value in arguments.items():
            if value is not None and (option := OPTIONS_BY_NAME.get(name)) is not None:
                changes[name] = _parsed(option, value if isinstance(value, list | tuple) else str(value), name)
        return replace(self, **changes)


OPTIONS = tuple(Option(each.name, default=each.default, **each.metadata) for each in fields(Settings))
OPTIONS_BY_NAME = {option.name: option for option in OPTIONS}


def _parsed(option: Option, value: object, source: str) -> object:
    if not option.many:
        return option.parse(str(value), source)
    texts = value if isinstance(value, list | tuple) else split_kernels(str(value))
    # The same one twice is one.
    return tuple(dict.fromkeys(option.parse(str(text), source) for text in texts if text))

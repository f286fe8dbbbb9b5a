"""How a kernel was configured, and whether that is what a test needs.

Where it is read from, the first that is there: the kernel itself (CONFIG_IKCONFIG, in its image or in the module `configs`), its
package (`config-RELEASE` beside it, or in its module tree), the `.config` of the tree that it was built in.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.guest.kernels.kernel import Kernel
from pytest_chvm.guest.kernels.modules import modules_in_order
from pytest_chvm.guest.kernels.unpacked import kernel_inside

PREFIX = "CONFIG_"
# kernel/configs.c has the file, packed with gzip, between these.
START, END = b"IKCFG_ST", b"IKCFG_ED"
LARGEST = 8 << 20
LINE = re.compile(r"CONFIG_(\w+)=(.*)|# CONFIG_(\w+) is not set")
NEED = re.compile(r"(?:CONFIG_)?([A-Z0-9a-z_]+)(?:=(.+))?")


class KernelConfig(Mapping[str, str]):
    """The options of a kernel, by name, with or without `CONFIG_`: "y", "m", "n" where it says that one is not set, or a value.

    A string is without its quotes. An option that it does not have, as where another one that it depends on is not set, is no key.
    """

    def __init__(self, text: str) -> None:
        found = (LINE.fullmatch(line.strip()) for line in text.splitlines())
        self._options = {each[1] or each[3]: _value(each[2]) for each in found if each is not None}

    def __getitem__(self, name: str) -> str:
        return self._options[name.removeprefix(PREFIX)]

    def __iter__(self) -> Iterator[str]:
        return (PREFIX + name for name in self._options)

    def __len__(self) -> int:
        return len(self._options)

    def __repr__(self) -> str:
        return f"<KernelConfig of {len(self)} options>"


def _value(text: str | None) -> str:
    if text is None:
        return "n"
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if len(text) > 1 and text[0] == text[-1] == '"' else text


@dataclass(frozen=True, slots=True)
class KernelNeeds:
    """What a test needs of its kernel: options as `NAME` (built in or a module), `NAME=VALUE` or `NAME=n`; a least version."""

    options: tuple[str, ...] = ()
    least_version: str | None = None

    @classmethod
    def checked(cls, options: object, least_version: object) -> KernelNeeds:
        """Return what a marker asks for; raises InvalidConfigError for what no kernel could have."""
        given: list[object] = [options] if isinstance(options, str) else []
        if not isinstance(options, str) and isinstance(options, Iterable):
            given = [*options]
        texts = [each for each in given if isinstance(each, str) and NEED.fullmatch(each)]
        if options is not None and (not given or len(texts) < len(given)):
            raise InvalidConfigError(f"kernel_config={options!r}, expected a list like ['BPF_LSM', 'KASAN=n', 'HZ=250']")
        if least_version is not None and (not isinstance(least_version, str) or not version_of(least_version)):
            raise InvalidConfigError(f"kernel_min={least_version!r}, expected a version like '6.1'")
        return cls(tuple(texts), least_version)

    def __bool__(self) -> bool:
        return bool(self.options or self.least_version)

    def why_not_version(self, release: str) -> str | None:
        """Return why a kernel of this release will not do, or None where it will."""
        if self.least_version is None or version_of(release) >= version_of(self.least_version):
            return None
        return f"the kernel is {release}, and {self.least_version} or newer is needed"

    def why_not_config(self, config: Mapping[str, str]) -> str | None:
        """Return why a kernel with this configuration will not do, or None where it will."""
        missing = [why for need in self.options if (why := _why_not(need, config)) is not None]
        return f"the kernel has {', '.join(missing)}" if missing else None


def _why_not(need: str, config: Mapping[str, str]) -> str | None:
    found = NEED.fullmatch(need)
    assert found is not None
    name, wanted = found[1], _value(found[2]) if found[2] else None
    value = config.get(name, "n")
    if value == wanted or (wanted is None and value != "n"):
        return None
    has = f"no {PREFIX}{name}" if value == "n" else f"{PREFIX}{name}={value}"
    return has if wanted in (None, "n") else f"{has} (needed: {wanted})"


def version_of(release: str) -> tuple[int, ...]:
    """Return the numbers that a release like `6.1.0-18-amd64` begins with, less zeros at their end; empty where there are none."""
    found = re.match(r"\d{1,9}(\.\d{1,9})*", release)
    numbers = [int(number) for number in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def config_of(kernel: Kernel) -> KernelConfig | None:
    """Return the configuration of a kernel, None where nothing of it is to be found on this machine."""
    try:
        found = kernel.image.stat()
    except OSError:
        return None
    return _config_of(kernel, found.st_mtime_ns)


@lru_cache(maxsize=16)
def _config_of(kernel: Kernel, _mtime_ns: int) -> KernelConfig | None:
    if (text := _built_in_config(kernel)) is not None:
        return KernelConfig(text)
    for place in _places(kernel):
        with suppress(OSError):
            with place.open("rb") as file:
                text = file.read(LARGEST).decode(errors="replace")
            if config := KernelConfig(text):
                return config
    return None


def unpacked_config(data: bytes) -> str | None:
    """Return the text of a `config.gz`, None where it is none."""
    try:
        return zlib.decompressobj(wbits=31).decompress(data, LARGEST).decode(errors="replace")
    except zlib.error:
        return None


def _built_in_config(kernel: Kernel) -> str | None:
    with suppress(OSError):
        inside = kernel_inside(kernel.image)
        if (text := _embedded(kernel.image.read_bytes() if inside is None else inside)) is not None:
            return text
    if kernel.modules_dir is not None and any(kernel.modules_dir.glob("kernel/kernel/configs.ko*")):
        for module in modules_in_order(kernel.modules_dir, ["configs"]):
            if (text := _embedded(module.data)) is not None:
                return text
    return None


def _embedded(data: bytes) -> str | None:
    start = data.find(START)
    end = data.find(END, start)
    return unpacked_config(data[start + len(START) : end]) if 0 <= start < end else None


def _places(kernel: Kernel) -> Iterator[Path]:
    for directory in dict.fromkeys((kernel.file.parent, kernel.file.resolve().parent)):
        if kernel.release is not None and os.sep not in kernel.release:
            yield directory / f"config-{kernel.release}"
            if kernel.file.name.startswith("vmlinu") and kernel.release not in kernel.file.name:
                yield directory / "config"
        # A tree has its image in itself or, for PCs, in arch/x86/boot.
        for tree in (directory, *directory.parents[:3]):
            if (tree / "Kconfig").exists() or tree == directory:
                yield tree / ".config"
    if kernel.modules_dir is not None:
        yield kernel.modules_dir / "config"
        yield kernel.modules_dir / ".config"
        yield kernel.modules_dir / "build" / ".config"
    if kernel.release is not None and os.sep not in kernel.release:
        yield Path(f"/boot/config-{kernel.release}")

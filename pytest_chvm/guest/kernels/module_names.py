"""Which of the modules that a test asks for a kernel has; what it has not is refused before anything is started."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.guest.kernels.kernel import Kernel
from pytest_chvm.guest.kernels.modules import is_build_tree, module_files
from pytest_chvm.model.modules import module_name

BUILT_IN = "modules.builtin"


def modules_to_load(modules: Sequence[str], kernel: Kernel, aliases: Path) -> dict[int, str]:
    """Return those of the modules, as `VmConfig.modules` has them, that are to be loaded, by their places: not what is built in.

    `aliases` is a `modules.alias`. Raises InvalidConfigError for one that the kernel does not have, and for parameters of what is
    built in.
    """
    assert kernel.modules_dir is not None
    known, built_in = module_files(kernel.modules_dir).keys(), built_in_modules(kernel.modules_dir)
    wanted = {}
    for place, module in enumerate(modules):
        name, parameters = module_name(module), module.split()[1:]
        if name in known:
            wanted[place] = module
        elif name in built_in:
            if parameters:
                words = " ".join(f"{name}.{parameter}" for parameter in parameters)
                raise InvalidConfigError(
                    f"the module {name!r} is built into kernel {kernel.release}, where its parameters are words of the kernel "
                    f"command line: use cmdline_extra={words!r}"
                )
        elif any(fnmatchcase(name, alias) for alias in _aliases(aliases)):
            wanted[place] = module
        else:
            raise InvalidConfigError(_missing(name, kernel, [*known, *built_in]))
    return wanted


def built_in_modules(modules_dir: Path) -> set[str]:
    """Return the names of what could be modules of a kernel and is built in; none where the kernel's files do not say."""
    with suppress(OSError):
        lines = (modules_dir / BUILT_IN).read_text(errors="replace").split()
        return {Path(line).name.split(".")[0].replace("-", "_") for line in lines}
    return set()


def _aliases(file: Path) -> Iterator[str]:
    with suppress(OSError):
        for line in file.read_text(errors="replace").splitlines():
            words = line.split()
            if len(words) == 3 and words[0] == "alias":
                yield words[1].replace("-", "_")


def _missing(name: str, kernel: Kernel, known: Sequence[str]) -> str:
    near, options = " or ".join(get_close_matches(name, known, n=3)), " or ".join(_options(name, kernel))
    return (
        f"kernel {kernel.release} has no module {name!r}, neither in {str(kernel.modules_dir)!r} nor built in"
        f"{f'; did you mean {near}?' if near else ''}{f'; it is made by {options}' if options else ''}"
    )


def _options(name: str, kernel: Kernel) -> list[str]:
    """Return the options that make a module, as `CONFIG_NAME`, with what they are set to where that is known."""
    # Few tests ask for what is not there.
    from pytest_chvm.guest.kernels.config import config_of

    config: Mapping[str, str] = config_of(kernel) or {}
    options = [*_options_of_makefiles(name, kernel)] or [
        option for option in (name.upper(), f"{name.upper()}_FS", f"NET_{name.upper()}", f"FS_{name.upper()}") if option in config
    ]
    return [f"CONFIG_{option}{', which is not set' if config.get(option, 'n') == 'n' else ''}" for option in options]


def _options_of_makefiles(name: str, kernel: Kernel) -> Iterator[str]:
    """Yield what a tree's Makefiles have the module depend on: `obj-$(CONFIG_NAME) += name.o`."""
    if kernel.modules_dir is None or not is_build_tree(kernel.modules_dir):
        return
    rule = re.compile(rf"^obj-\$\(CONFIG_(\w+)\)\s*[+:]?=.*\b{re.escape(name).replace('_', '[_-]')}\.o\b", re.M)
    for directory in ("fs", "net", "drivers", "lib", "crypto", "kernel", "block", "sound", "security", "mm", "arch"):
        for makefile in (kernel.modules_dir / directory).rglob("Makefile"):
            with suppress(OSError):
                yield from rule.findall(makefile.read_text(errors="replace"))

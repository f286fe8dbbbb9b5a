"""What an image's boot loader would boot, by its configuration: BLS entries, grub.cfg, extlinux.conf. Only texts are read here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

# A kernel in /boot, or beside its modules.
KERNEL_NAME = re.compile(r"(vmlinuz|vmlinux|bzImage|Image|kernel)([-.].*)?")


@dataclass(frozen=True, slots=True)
class BootEntry:
    """A kernel, by its path as the boot loader has it, and its command line; `names` are what a default may call it."""

    kernel: str
    options: str
    names: tuple[str, ...] = ()


def chosen_entry(texts: Mapping[str, str]) -> BootEntry | None:
    """Return the entry that a boot loader with these files would boot, None where they have none.

    `texts` are files by their paths: `loader/entries/*.conf`, `loader.conf`, `grub.cfg`, `grubenv`, `extlinux.conf`.
    """
    environment = _grub_environment(_all_named(texts, "grubenv"))
    bls = [_bls_entry(path, text, environment) for path, text in texts.items() if "/loader/entries/" in path]
    by_version = sorted((entry for entry in bls if entry is not None), key=lambda entry: version_key(entry.names[0]), reverse=True)
    grub = [entry for text in _all_named(texts, "grub.cfg") for entry in _grub_entries(text, environment)]
    syslinux = [entry for text in _all_named(texts, "extlinux.conf", "syslinux.cfg") for entry in _syslinux_entries(text)]
    defaults = [environment.get("saved_entry"), *_defaults(texts)]
    for entries in (by_version, grub, syslinux):
        # An image may have both: then grub.cfg has a line that reads the others.
        whole = [entry for entry in entries if not re.search(r"rescue|recovery|fallback", " ".join((entry.kernel, *entry.names)))]
        for default in defaults:
            if default and (found := _named(default, entries)):
                return found
        if whole or entries:
            return (whole or entries)[0]
    return None


def newest(kernels: Iterable[str]) -> str | None:
    """Return the path of the newest of some kernels, by the version in its name or its directory's."""
    known = [path for path in kernels if KERNEL_NAME.fullmatch(PurePosixPath(path).name) and "rescue" not in path]

    def version(path: str) -> tuple[bool, list[tuple[int, int | str]]]:
        file = PurePosixPath(path)
        text = file.parent.name if "/modules/" in path else file.name.partition("-")[2]
        return not file.name.endswith(".old"), version_key(text)

    return max(known, key=version, default=None)


def version_key(text: str) -> list[tuple[int, int | str]]:
    """Return a key that sorts 6.10 after 6.9."""
    return [(1, int(part)) if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text) if part]


def _all_named(texts: Mapping[str, str], *names: str) -> list[str]:
    return [text for path, text in texts.items() if PurePosixPath(path).name in names]


def _grub_environment(texts: Iterable[str]) -> dict[str, str]:
    lines = [line for text in texts for line in text.splitlines()]
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def _defaults(texts: Mapping[str, str]) -> list[str]:
    """Return what the files say that the default is, of which a number counts the entries."""
    found = []
    for text in _all_named(texts, "grub.cfg"):
        found += re.findall(r"""^\s*set default=["']?([^"'$\s][^"'$\n]*)["']?\s*$""", text, re.M)
    for text in _all_named(texts, "loader.conf", "extlinux.conf", "syslinux.cfg"):
        found += re.findall(r"^\s*default\s+(\S+)\s*$", text, re.M | re.I)
    return found


def _named(default: str, entries: list[BootEntry]) -> BootEntry | None:
    if default.isdigit():
        return entries[int(default)] if int(default) < len(entries) else None
    # "submenu>entry" of GRUB.
    wanted = default.split(">")[-1].removesuffix(".conf")
    return next((entry for entry in entries if wanted in entry.names), None)


def _bls_entry(path: str, text: str, environment: Mapping[str, str]) -> BootEntry | None:
    """Read an entry of the Boot Loader Specification."""
    values: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.strip().partition(" ")
        values.setdefault(key, []).append(value.strip())
    if "linux" not in values:
        return None
    options = re.sub(r"\$(\w+)", lambda match: environment.get(match[1], ""), " ".join(values.get("options", [])))
    name = PurePosixPath(path).name.removesuffix(".conf")
    return BootEntry(values["linux"][0], options, (values.get("version", [name])[0], name, *values.get("title", [])))


def _grub_entries(text: str, environment: Mapping[str, str]) -> Iterable[BootEntry]:
    names: tuple[str, ...] = ()
    for line in text.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        if words[:1] == ["menuentry"]:
            at = words.index("$menuentry_id_option") + 1 if "$menuentry_id_option" in words else 0
            names = (*words[1:2], *(words[at : at + 1] if at else ()))
        elif len(words) > 1 and re.fullmatch(r"linux(16|efi)?", words[0]):
            options = [word for word in words[2:] if not word.startswith("$")]
            options += environment.get("kernelopts", "").split() if "$kernelopts" in words else []
            yield BootEntry(words[1], " ".join(options), names)


def _syslinux_entries(text: str) -> Iterable[BootEntry]:
    for label in re.split(r"^\s*label\s+", text, flags=re.M | re.I)[1:]:
        name, _, rest = label.partition("\n")
        fields = {key.lower(): value.strip() for key, value in re.findall(r"^\s*(\w+)\s+(.*)$", rest, re.M)}
        if kernel := fields.get("linux") or fields.get("kernel"):
            yield BootEntry(kernel, fields.get("append", ""), (name.strip(),))

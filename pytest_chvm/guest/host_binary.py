"""A program of the host's, with the libraries that it loads, for a guest that has none: the built-in one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pytest_chvm.errors import InvalidConfigError, MissingRequirementError

LDD_TIMEOUT_S = 30.0
# As ldd of glibc and of musl say what a program loads: `libc.so.6 => /lib/libc.so.6 (0x7f...)`, `/lib64/ld-linux.so.2 (0x7f...)`.
LOADED = re.compile(r"\s*(?:\S+ => )?(/.*) \(0x[0-9a-f]+\)")
MISSING = re.compile(r"\s*(\S+) => not found")
# There the guest's own commands are, which stay what they are.
OF_GUEST = ("/bin", "/sbin", "/usr/bin", "/usr/sbin")
ELSEWHERE = "/usr/local/bin"


@dataclass(frozen=True, slots=True)
class HostBinary:
    """A program of the host's: its file, where it is to be in a guest, and the libraries, whose paths there are those here."""

    file: Path
    place: str
    libraries: tuple[Path, ...]

    @property
    def files(self) -> dict[str, Path]:
        """The files that a guest needs, by where they are to be there."""
        return {self.place: self.file, **{os.fspath(library): library for library in self.libraries}}

    @property
    def library_path(self) -> str:
        """Where the guest is to look for the libraries, as it has no cache of them: the value of LD_LIBRARY_PATH."""
        return ":".join(dict.fromkeys(os.fspath(library.parent) for library in self.libraries))


def host_binary(name: str | os.PathLike[str]) -> HostBinary:
    """Return the program of a path, or of a name on PATH.

    Raises InvalidConfigError where there is none, where it is a script, or where it lacks a library; MissingRequirementError
    without ldd.
    """
    text = os.fsdecode(name)
    found = shutil.which(text)
    if found is None:
        raise InvalidConfigError(f"the host has no program {text!r}: expected a path of an executable file, or a name on PATH")
    file = Path(found).resolve()
    with file.open("rb") as program:
        head = program.read(4)
    if head != b"\x7fELF":
        what = "a script, which needs its interpreter and more" if head[:2] == b"#!" else "no ELF executable"
        raise InvalidConfigError(f"{found!r} is {what}: use a VM with root='host', where all programs of the host's are")
    directory = os.path.dirname(os.path.abspath(found))
    in_place = os.fspath(Path(directory).resolve()) not in OF_GUEST and directory not in OF_GUEST
    place = os.path.abspath(found) if in_place else f"{ELSEWHERE}/{os.path.basename(found)}"
    return HostBinary(file, place, _libraries(file))


def _libraries(file: Path) -> tuple[Path, ...]:
    try:
        done = subprocess.run(
            ["ldd", file],
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=LDD_TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise MissingRequirementError("there is no ldd, which says what libraries a program loads (package libc-bin)") from error
    except subprocess.TimeoutExpired as error:
        raise InvalidConfigError(f"ldd does not end for {str(file)!r}, so that its libraries are not known") from error
    said = f"{done.stdout}\n{done.stderr}"
    if done.returncode != 0:
        # Of a static program it says just that, and ends with an error.
        if "not a dynamic executable" in said or "statically linked" in said or "Not a valid dynamic program" in said:
            return ()
        raise InvalidConfigError(f"what libraries {str(file)!r} loads cannot be told: {said.strip()[:500]}")
    if missing := [found[1] for line in done.stdout.splitlines() if (found := MISSING.fullmatch(line))]:
        raise InvalidConfigError(f"the host does not have what {str(file)!r} loads: {', '.join(missing)}")
    return tuple(Path(found[1]) for line in done.stdout.splitlines() if (found := LOADED.fullmatch(line)))

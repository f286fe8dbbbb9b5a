"""Where in a kernel's source the addresses of a splat are: what the kernel tree's scripts/decode_stacktrace.sh does.

For a kernel of which a `vmlinux` with debug information (DWARF) is known. Addresses of modules are left as they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from pytest_chvm.base.deadline import Deadline
from pytest_chvm.guest.kernels.kernel import Kernel

# "bar+0x2/0x30" with nothing behind it that says that it is a module's.
PLACE = re.compile(r"(?<![\w.])([A-Za-z_][\w.]{0,200})\+0x([0-9a-f]{1,8})/0x([0-9a-f]{1,8})(?! \[)")
# Of these it is the instruction itself that is named, of others the one behind a call.
EXACT = re.compile(r"\s*(?:RIP|EIP|pc) ?: |WARNING: |BUG: |.* PC is at ")
MOST_PLACES = 64
# A large kernel's are read in Python.
TIMEOUT_S = 20.0


def debug_kernel(kernel: Kernel) -> Path | None:
    """Return the `vmlinux` with debug information that belongs to a kernel, where there is one that can be read.

    Looked for are the file itself, its build tree, and where distributions put it: beside the kernel's own tree, and the host's.
    """
    image, release = kernel.file.resolve(), kernel.release
    places = [image, kernel.image, image.parent / "vmlinux", *(parent / "vmlinux" for parent in image.parents[1:4])]
    if release:
        roots = (image.parent.parent, Path("/"))
        places = [image, kernel.image, image.parent / f"vmlinux-{release}", *places[2:]]
        places += [
            root / "usr/lib/debug" / name
            for root in roots
            for name in (f"boot/vmlinux-{release}", f"lib/modules/{release}/vmlinux")
        ]
        places += [root / "lib/modules" / release / "build/vmlinux" for root in roots]
    return next((place for place in places if _has_debug_information(place)), None)


def _has_debug_information(file: Path) -> bool:
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        with file.open("rb") as opened:
            return opened.read(4) == b"\x7fELF" and ELFFile(opened).get_section_by_name(".debug_line") is not None
    except (OSError, ELFError):
        return False


def decoded(text: str, vmlinux: Path) -> str:
    """Return a splat's text with "(FILE:LINE)" behind each function of the kernel's that can be told, the first 64 of them.

    Where it takes too long, or the file is damaged, the rest is as it was.
    """
    places = {(match[1], int(match[3], 16)) for match in PLACE.finditer(text)}
    deadline = Deadline.after(TIMEOUT_S)
    try:
        with vmlinux.open("rb") as file:
            lines = _Lines(file, {name for name, _size in places})
            return "\n".join(_decoded_line(line, lines, deadline) for line in text.split("\n"))
    except Exception:
        # Whatever a library says of a file that it cannot read must not hide the splat.
        return text


def _decoded_line(line: str, lines: _Lines, deadline: Deadline) -> str:
    behind_call = 0 if EXACT.match(line) else 1

    def with_place(match: re.Match[str]) -> str:
        if deadline.expired or lines.asked >= MOST_PLACES:
            return match[0]
        where = lines.place_of(match[1], int(match[2], 16), int(match[3], 16), behind_call)
        return match[0] if where is None else f"{match[0]} ({where})"

    return PLACE.sub(with_place, line)


class _Lines:
    """The line tables of an ELF file, for functions of these names."""

    def __init__(self, file: Any, names: set[str]) -> None:
        from elftools.elf.elffile import ELFFile

        elf = ELFFile(file)
        self.asked = 0
        self._dwarf = elf.get_dwarf_info()
        self._functions: dict[tuple[str, int], list[int]] = {}
        self._units: list[tuple[int, int, Any]] | None = None
        self._tables: dict[int, list[tuple[int, str, int]]] = {}
        symbols: Any = elf.get_section_by_name(".symtab")
        for symbol in symbols.iter_symbols():
            if symbol.name in names:
                self._functions.setdefault((symbol.name, symbol["st_size"]), []).append(symbol["st_value"])

    def place_of(self, name: str, offset: int, size: int, behind_call: int) -> str | None:
        """Return "FILE:LINE" of an address in a function; None where that is not known, or is another function's too."""
        starts = self._functions.get((name, size), [])
        if not starts:
            # The kernel counts up to the next function, which is aligned.
            starts = [
                start for (other, own), found in self._functions.items() if other == name and 0 < size - own < 64 for start in found
            ]
        if len(starts) != 1:
            return None
        self.asked += 1
        address = starts[0] + offset - (behind_call if offset else 0)
        unit = self._unit_of(address)
        return None if unit is None else self._in_table(unit, address)

    def _unit_of(self, address: int) -> Any:
        ranges = self._dwarf.get_aranges()
        if ranges is not None and (offset := ranges.cu_offset_at_addr(address)) is not None:
            return self._dwarf.get_CU_at(offset)
        if self._units is None:
            self._units = [(low, high, unit) for unit in self._dwarf.iter_CUs() for low, high in _ranges_of(self._dwarf, unit)]
        return next((unit for low, high, unit in self._units if low <= address < high), None)

    def _in_table(self, unit: Any, address: int) -> str | None:
        if unit.cu_offset not in self._tables:
            self._tables[unit.cu_offset] = list(_rows(self._dwarf, unit))
        rows = self._tables[unit.cu_offset]
        best = None
        for (low, file, line), (high, _file, _line) in pairwise(rows):
            if low <= address < high and file:
                best = f"{file}:{line}"
        return best


def _ranges_of(dwarf: Any, unit: Any) -> Iterator[tuple[int, int]]:
    top = unit.get_top_DIE().attributes
    if "DW_AT_ranges" in top and (ranges := dwarf.range_lists()) is not None:
        base = top["DW_AT_low_pc"].value if "DW_AT_low_pc" in top else 0
        for entry in ranges.get_range_list_at_offset(top["DW_AT_ranges"].value, cu=unit):
            if hasattr(entry, "begin_offset"):
                plus = 0 if entry.is_absolute else base
                yield plus + entry.begin_offset, plus + entry.end_offset
            else:
                base = entry.base_address
    elif "DW_AT_low_pc" in top and "DW_AT_high_pc" in top:
        low, high = top["DW_AT_low_pc"].value, top["DW_AT_high_pc"]
        yield low, high.value if high.form == "DW_FORM_addr" else low + high.value


def _rows(dwarf: Any, unit: Any) -> Iterator[tuple[int, str, int]]:
    """Yield address, file and line of each row of a unit's line table; an empty file ends a sequence."""
    program = dwarf.line_program_for_CU(unit)
    if program is None:
        return
    top = unit.get_top_DIE().attributes
    base = top["DW_AT_comp_dir"].value if "DW_AT_comp_dir" in top else b""
    files: dict[int, str] = {}
    for entry in program.get_entries():
        state = entry.state
        if state is None:
            continue
        if state.file not in files:
            files[state.file] = _file_name(program, state.file, base)
        yield state.address, "" if state.end_sequence else files[state.file], state.line


def _file_name(program: Any, number: int, base: bytes) -> str:
    """Return the name of a file of a line table, relative to the directory of the build."""
    header = program.header
    # From DWARF 5 on they are counted from 0, and the directory 0 is that of the build.
    first = 0 if header.version >= 5 else 1
    if not first <= number < len(header.file_entry) + first:
        return ""
    file = header.file_entry[number - first]
    directories = header.include_directory
    index = file.dir_index - (0 if header.version >= 5 else 1)
    directory = directories[index] if 0 <= index < len(directories) else b""
    path = os.path.join(os.fsdecode(base), os.fsdecode(directory), os.fsdecode(file.name))
    inside = os.path.normpath(path)
    return os.path.relpath(inside, os.fsdecode(base)) if base and inside.startswith(os.fsdecode(base) + "/") else inside

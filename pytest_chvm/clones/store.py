"""The store of templates: saved VMs that outlive a run, each under a key of all that it is made of."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_chvm.base.cache import built_once, remove_unfinished
from pytest_chvm.base.lockfiles import try_lock, wait_for_lock
from pytest_chvm.base.progress import Progress, show_progress
from pytest_chvm.base.text import clean
from pytest_chvm.base.trees import remove_tree
from pytest_chvm.base.untouched import wall_clock_s
from pytest_chvm.clones.digests import DIGESTS_DIR, digest_of, identity_of
from pytest_chvm.errors import HostError, UnsupportedError
from pytest_chvm.host.keeper.remains import boot_id

RECORD_FILE = "template.json"
CHECKED_FILE = "checked"
# What a malformed record raises.
NO_RECORD = (ValueError, KeyError, TypeError, IndexError, AttributeError)
# The disk space of all of a user's templates; one takes about 100 MB.
LIMIT_MB = 4096
WANTED_FOR_S = 30 * 86400.0
UNFIT_FOR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Template:
    """A saved VM in the store; `key` names it, `made_of` says in words what it is."""

    directory: Path

    @property
    def key(self) -> str:
        """The name of it."""
        return self.directory.name

    @property
    def size_mb(self) -> int:
        """What it takes of the disk, in MiB: its memory file is sparse."""
        return sum(file.stat().st_blocks * 512 for file in self.directory.iterdir()) >> 20

    @property
    def last_used_s(self) -> float:
        """When it was last used, in seconds since the epoch."""
        return (self.directory / RECORD_FILE).stat().st_mtime

    @property
    def made_of(self) -> dict[str, Any]:
        """What it was made of, by name; see `templates.made_of`."""
        made_of: dict[str, Any] = _record(self.directory)["made_of"]
        return made_of

    @property
    def unfit(self) -> str | None:
        """Why no template can be made of these parts; None where this is a template."""
        with suppress(OSError, *NO_RECORD):
            record = _record(self.directory)
            return str(record["unfit"]) if record["unfit"] else None
        return None

    def is_intact(self, *, wholly: bool = False) -> bool:
        """Tell whether its files are those that were written: by size, inode and time, or `wholly` by content."""
        try:
            record = _record(self.directory)
            for name, (size, inode, mtime_ns, _digest_then) in record["files"].items():
                found = (self.directory / name).stat()
                if (found.st_size, found.st_ino, found.st_mtime_ns) != (size, inode, mtime_ns):
                    return False
            if record["unfit"]:
                # The failure may have been a busy machine's.
                return wall_clock_s() - (self.directory / RECORD_FILE).stat().st_mtime < UNFIT_FOR_S
            # A crash of the host may have lost data that sizes and times do not show.
            if wholly or boot_id() not in (record["boot_id"], self._checked_in()):
                if any(digest_of(self.directory / name) != digest for name, (_, _, _, digest) in record["files"].items()):
                    return False
                # All content is read only once in each boot of the host.
                with suppress(OSError):
                    (self.directory / CHECKED_FILE).write_text(boot_id())
        except (OSError, *NO_RECORD):
            return False
        return True

    def _checked_in(self) -> str | None:
        """Return the boot of the host in which all of it was last read."""
        with suppress(OSError):
            return (self.directory / CHECKED_FILE).read_text()
        return None


@dataclass(frozen=True, slots=True)
class HeldTemplate:
    """A template that is not pruned until `release`, or the end of this process."""

    directory: Path
    _fd: int

    def call_unfit(self, why: str) -> None:
        """Have no more clones started from it for an hour, except by `boot="clone"`; also works after `release`."""
        with suppress(OSError, *NO_RECORD):
            record = _record(self.directory)
            # Overwritten in place: holders of the template have a lock on this file.
            (self.directory / RECORD_FILE).write_text(json.dumps({**record, "unfit": why}))

    def release(self) -> None:
        """Let go of it."""
        os.close(self._fd)


class TemplateStore:
    """The templates of one cache directory; `progress` is told what is waited for."""

    def __init__(self, cache: Path, progress: Progress = show_progress) -> None:
        self._progress = progress
        self.directory = cache / "templates"

    def get(
        self, made_of: Mapping[str, object], room_mb: int, build: Callable[[Path], None], *, try_again: bool = True
    ) -> HeldTemplate:
        """Return the template that is made of these, built at the first call; others that want it wait.

        `build` has a VM saved in an empty directory, which takes `room_mb` at most. Raises HostError where the store
        cannot be written or has not so much room, and what `build` raises; without `try_again` also where it was waited for one
        that failed, which would fail again for each that waits, one after the other. An UnsupportedError of `build` is kept, and
        raised again for an hour, unless with `try_again`.
        """
        directory = self._place(made_of)

        def build_and_record(unfinished: Path) -> None:
            self.prune()
            free_mb = shutil.disk_usage(unfinished).free >> 20
            if free_mb < room_mb:
                raise HostError(
                    f"a template may take {room_mb} MiB and {str(self.directory)!r} has {free_mb} MiB free: free some, or set "
                    "CHVM_CACHE_DIR to a directory with more"
                )
            unfit = None
            try:
                build(unfinished)
            except UnsupportedError as error:
                unfit = str(error)
                for file in unfinished.iterdir():
                    file.unlink()
            files = {file.name: identity_of(file) for file in sorted(unfinished.iterdir())}
            record = {"boot_id": boot_id(), "made_of": dict(made_of), "files": files, "unfit": unfit}
            (unfinished / RECORD_FILE).write_text(json.dumps(record))

        def will_do(found: Path) -> bool:
            template = Template(found)
            return template.is_intact() and not (template.unfit and try_again)

        while True:
            built_once(directory, build_and_record, will_do, mode=0o700, try_again=try_again, progress=self._progress)
            if (unfit := Template(directory).unfit) is not None:
                raise UnsupportedError(unfit)
            if (fd := _hold(directory, self._progress)) is not None:
                return HeldTemplate(directory, fd)

    def wanted_before(self, made_of: Mapping[str, object]) -> bool:
        """Tell whether `want` was called for the same parts within the last month; False where the store cannot be written."""
        wanted = self._place(made_of).with_suffix(".wanted").exists()
        if wanted:
            self.want(made_of)
        return wanted

    def want(self, made_of: Mapping[str, object]) -> None:
        """Remember that a template of these parts was wanted."""
        with suppress(OSError):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._place(made_of).with_suffix(".wanted").touch()

    def _place(self, made_of: Mapping[str, object]) -> Path:
        text = json.dumps(made_of, sort_keys=True)
        return self.directory / hashlib.sha256(text.encode()).hexdigest()[:32]

    def all(self) -> list[Template]:
        """Return all templates, the most recently used first; entries that are no templates are skipped."""
        found = []
        for record in self.directory.glob(f"[0-9a-f]*/{RECORD_FILE}"):
            # Another process may be removing it.
            with suppress(FileNotFoundError):
                found.append((record.stat().st_mtime, Template(record.parent)))
        return [template for _, template in sorted(found, key=lambda pair: pair[0], reverse=True)]

    def prune(self, limit_mb: int = LIMIT_MB) -> list[Template]:
        """Remove the least recently used templates until the rest takes `limit_mb` or less; those in use stay.

        Returns the removed ones.
        """
        remove_unfinished(self.directory)
        for directory in self.directory.glob("[0-9a-f]*/"):
            if directory.is_dir() and not (directory / RECORD_FILE).exists():
                remove_tree(directory)
        for note in (*self.directory.glob("*.wanted"), *self.directory.parent.glob(f"{DIGESTS_DIR}/*.blake2b")):
            with suppress(FileNotFoundError):
                if wall_clock_s() - note.stat().st_mtime > WANTED_FOR_S:
                    note.unlink()
        removed = []
        kept_mb = 0
        for template in self.all():
            try:
                size_mb = template.size_mb
            except FileNotFoundError:
                # Another process removes it just now.
                continue
            kept_mb += size_mb
            if kept_mb > limit_mb and _remove_unused(template):
                removed.append(template)
        return removed


def _hold(directory: Path, progress: Progress) -> int | None:
    """Return a descriptor that keeps a template from being pruned while it is open; None where it was just pruned."""
    record = directory / RECORD_FILE
    try:
        fd = os.open(record, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        wait_for_lock(fd, str(directory), progress, shared=True)
        # It may have been removed during the wait for the lock.
        if os.fstat(fd).st_nlink:
            # Its file system may be read-only.
            with suppress(OSError):
                os.utime(fd)
            return fd
    except BaseException as error:
        os.close(fd)
        if isinstance(error, TimeoutError):
            raise HostError(str(error)) from error
        raise
    os.close(fd)
    return None


def describe(template: Template, *, wholly: bool) -> dict[str, Any]:
    """Return what a person may want to know of a template, as JSON has it; `wholly`: check all of its content."""
    used = datetime.datetime.fromtimestamp(template.last_used_s, datetime.UTC)
    try:
        made_of = template.made_of
        words = [str(made_of["vmm"][0]), f"{made_of['memory_mb'][0]} MiB", f"{made_of['processors'][0]} CPUs"]
        words += [*made_of["networks"], *(["hotplug"] if made_of["hotplug"] else [])]
        words += [f"no template: {clean(template.unfit.encode(errors='replace'))}"] if template.unfit else []
    except NO_RECORD:
        made_of, words = {}, ["its record cannot be read"]
    return {
        "key": template.key,
        "size_mb": template.size_mb,
        "last_used": used.isoformat(timespec="seconds"),
        "what": ", ".join(words),
        "intact": template.is_intact(wholly=wholly),
        "made_of": made_of,
    }


def _remove_unused(template: Template) -> bool:
    try:
        fd = os.open(template.directory / RECORD_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if not try_lock(fd) or not os.fstat(fd).st_nlink:
            # It is in use, or was removed meanwhile and its place has another template, which may be in use.
            return False
        # From here on it is no template; if this process is killed now, the next pruning removes the rest.
        (template.directory / RECORD_FILE).unlink()
        remove_tree(template.directory)
        return True
    except FileNotFoundError:
        return False
    finally:
        os.close(fd)


def _record(directory: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((directory / RECORD_FILE).read_text())
    return record

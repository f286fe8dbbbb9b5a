"""What is needed to find a VM again, and the state it is in."""

from __future__ import annotations

import enum
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from pytest_chvm.errors import InvalidConfigError


class VmState(enum.StrEnum):
    """Where a VM is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    READY = "ready"
    PAUSED = "paused"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class VmStatus:
    """A VM's state, and its IP once the ready marker was seen."""

    state: VmState
    ip: str | None = None


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process that cannot be mistaken for a later one with the same pid.

    `start_time_ticks` is field 22 of `/proc/PID/stat` (proc(5)), in clock ticks since the host's boot.
    """

    pid: int
    start_time_ticks: int | None = None


@dataclass(frozen=True, slots=True)
class VmHandle:
    """What is needed to find, ask and end a VM, also from another process: it survives JSON."""

    name: str
    namespace: str
    vmm: str
    state: VmState
    process: ProcessIdentity | None
    serial_log: Path
    machine_id: str
    run_dir: Path | None = None
    ready_marker: str = "CHVM_READY"
    nonce: str | None = None
    taps: tuple[str, ...] = ()
    netns: str | None = None
    sidecars: tuple[ProcessIdentity, ...] = ()
    command: tuple[str, ...] = field(default=(), repr=False)

    @property
    def vmm_log(self) -> Path:
        """Where the VMM's own stdout and stderr go."""
        return self.serial_log.with_suffix(".vmm.log")

    @property
    def event_log(self) -> Path:
        """Where what happens to the VM is written down, as JSON lines; see `pytest_chvm.machine.events`."""
        return self.serial_log.with_suffix(".events.jsonl")

    def to_json(self) -> str:
        """Return the handle as a JSON object."""
        values = asdict(self)
        values["serial_log"] = os.fspath(self.serial_log)
        values["run_dir"] = None if self.run_dir is None else os.fspath(self.run_dir)
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the handle that `to_json` wrote; raises InvalidConfigError where the text is none."""
        try:
            values = json.loads(text)
            values["state"] = VmState(values["state"])
            values["process"] = values["process"] and ProcessIdentity(**values["process"])
            values["serial_log"] = Path(values["serial_log"])
            values["run_dir"] = Path(values["run_dir"]) if values.get("run_dir") else None
            values["taps"] = tuple(values.get("taps", ()))
            values["sidecars"] = tuple(ProcessIdentity(**p) for p in values.get("sidecars", ()))
            values["command"] = tuple(values.get("command", ()))
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidConfigError(
                f"this is no VmHandle: {type(error).__name__}: {error}; expected what VmHandle.to_json() wrote"
            ) from error

"""A device that was plugged into a running VM."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_chvm.model import ProcessIdentity, ServedShare


@dataclass(frozen=True, slots=True)
class Device:
    """A device that was plugged in; `id` is the VMM's name for it."""

    id: str
    kind: str
    tap: str | None = None
    mac: str | None = None
    served: ServedShare | None = None

    @property
    def sidecar(self) -> ProcessIdentity | None:
        """The virtiofsd of a shared dir."""
        return self.served.process if self.served else None

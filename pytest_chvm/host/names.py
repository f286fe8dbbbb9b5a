"""The names of running VMs."""

from __future__ import annotations

import threading

from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.host.keeper import remains
from pytest_chvm.model import ProcessIdentity, VmConfig


class LiveNames:
    """The names in use in a run: two VMs of one name and namespace at once are refused."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders: dict[tuple[str, str], ProcessIdentity | None] = {}

    def claim(self, config: VmConfig) -> None:
        """Take a VM's name, before its process is there; raises InvalidConfigError where one of that name runs."""
        with self._lock:
            self.require_free(config)
            self._holders[config.namespace, config.name] = None

    def require_free(self, config: VmConfig) -> None:
        """Raise InvalidConfigError where a VM of that name and namespace runs."""
        key = (config.namespace, config.name)
        if key in self._holders:
            holder = self._holders[key]
            # A name without a process belongs to a VM that is being booted; a process that has ended holds no name.
            if holder is None or remains.start_time_ticks(holder.pid) == holder.start_time_ticks:
                raise InvalidConfigError(
                    f"a VM named {config.name!r} in namespace {config.namespace!r} is running already: "
                    "give this one another name, or stop that one first",
                    vm_name=config.name,
                )

    def started(self, config: VmConfig, process: ProcessIdentity) -> None:
        """Remember whose a claimed name is."""
        with self._lock:
            self._holders[config.namespace, config.name] = process

    def free(self, namespace: str, name: str, process: ProcessIdentity | None) -> None:
        """Give a name back, unless another VM has taken it meanwhile."""
        with self._lock:
            if (namespace, name) in self._holders and self._holders[namespace, name] in (None, process):
                del self._holders[namespace, name]

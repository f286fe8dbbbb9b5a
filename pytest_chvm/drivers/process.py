"""The life of a VMM's process, the same for every driver: the order of a boot, stop, kill and state."""

from __future__ import annotations

import os
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_chvm.base.steps import take_all
from pytest_chvm.base.text import last_lines
from pytest_chvm.drivers.base import VmDriver, check_abilities, logger
from pytest_chvm.drivers.boot import CONSOLE_FILE, MEMORY_FILE, Boot, BootOptions, VmmCommand
from pytest_chvm.drivers.memory import Memory, copied_to_memory
from pytest_chvm.drivers.preflight import preflight
from pytest_chvm.errors import (
    HostError,
    HypervisorError,
    StateFailedError,
    StopFailedError,
    VmError,
    VmNotFoundError,
)
from pytest_chvm.guest.ready import ReadyScanner
from pytest_chvm.host.host import Host
from pytest_chvm.host.keeper import records
from pytest_chvm.host.leases import Lease
from pytest_chvm.host.networks.tap import remove_taps
from pytest_chvm.host.processes import end_all, end_process, is_running
from pytest_chvm.model import ProcessIdentity, ServedShare, VmConfig, VmHandle, VmState, VmStatus

if TYPE_CHECKING:
    from pytest_chvm.host.virtiofsd import StartedShare

STOP_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 2.0
SIDECAR_TIMEOUT_S = 1.0


@dataclass
class VmmProcess:
    """The life of a VMM's process, for the drivers to delegate to.

    `programs` are the names one of which must be in the command line of a process before it is signalled.
    """

    driver: VmDriver
    programs: Sequence[str]
    virtiofsd: Path | None
    host: Host

    def __post_init__(self) -> None:
        self._scanners: dict[str, ReadyScanner] = {}
        self._paused: set[str] = set()
        self._booted_here: set[str] = set()
        self._ends: dict[str, threading.RLock] = {}

    def boot(
        self,
        config: VmConfig,
        build: Callable[[Boot], VmmCommand],
        options: BootOptions,
        restoring: Path | None = None,
    ) -> VmHandle:
        """Start a VMM: checks first, then the sidecars, then it. Whatever fails leaves nothing behind."""
        check_abilities(self.driver, config)
        if not options.checked:
            preflight(config)
        self.host.names.claim(config)
        mine = None
        fds: list[int] = []
        try:
            mine = options.lease or Lease(self.host)
            return self._start(config, build, mine, options, restoring, fds)
        except BaseException as error:
            self.host.names.free(config.namespace, config.name, None)
            # Whatever was started meanwhile names the lease in its arguments, by which it is found and ended.
            failures = records.remove_lease(mine.directory) if mine is not None else []
            for failure in failures:
                logger.error("%s: left behind by a failed boot: %s", config.name, failure)
            if isinstance(error, VmError):
                error.vm_name = error.vm_name or config.name
            elif isinstance(error, OSError):
                raise HostError(f"VM {config.name!r} could not be started: {error}", vm_name=config.name) from error
            raise
        finally:
            # The VMM has inherited its copies, or was not started. A clone's memory is among them.
            for fd in fds:
                os.close(fd)

    def _start(
        self,
        config: VmConfig,
        build: Callable[[Boot], VmmCommand],
        lease: Lease,
        options: BootOptions,
        restoring: Path | None,
        fds: list[int],
    ) -> VmHandle:
        serial_log = config.serial_log or lease.directory / "serial.log"
        boot = Boot(config, lease, serial_log, options, fds=fds, restoring=restoring)
        handle = VmHandle(
            config.name, config.namespace, self.driver.vmm, VmState.STARTING, None, serial_log, boot.machine_id,
            lease.directory, options.ready_marker, options.nonce, netns=config.netns,
        )  # fmt: skip
        _start_log(serial_log, config, restoring and restoring / CONSOLE_FILE)
        _start_log(handle.vmm_log, config)
        started = self._start_shares(boot) if config.shared_dirs else []
        # Which may mean to copy it, while they start.
        boot.memory = _memory_of(boot)
        sidecars = [share.wait().process for share in started]
        command = build(boot)
        argv = [*command.machine, *command.control]
        logger.info("%s: %s", config.name, shlex.join(argv))
        output = serial_log if command.prints_console else None
        grow = (serial_log, command.event_log)
        process = self.host.keeper().spawn(argv, handle.vmm_log, lease.directory, boot.fds, output=output, other_logs=grow)
        self.host.started.add("VM")
        self.host.names.started(config, process)
        self._booted_here.add(boot.machine_id)
        return replace(
            handle, process=process, taps=tuple(boot.taps_to_remove), sidecars=tuple(sidecars), command=command.for_people()
        )

    def _start_shares(self, boot: Boot) -> list[StartedShare]:
        # Most VMs have none, and each process that starts a VM would wait for it.
        from pytest_chvm.host.virtiofsd import find_virtiofsd, start_share

        program = find_virtiofsd(self.virtiofsd)
        started = []
        for index, share in enumerate(boot.config.shared_dirs):
            path = boot.socket(f"fs{index}.sock")
            logger.debug("%s: starting virtiofsd for %s", boot.config.name, share.tag)
            started.append(start_share(program, share, path, self.host, boot.lease))
            boot.share_sockets.append(path)
        return started

    @contextmanager
    def restoring(self, handle: VmHandle, kill: Callable[[VmHandle], None]) -> Iterator[None]:
        """End a VM with `kill` whose restore fails in the block; raises HypervisorError with what the VMM's log says."""
        try:
            yield
        except BaseException as error:
            said = last_lines(handle.vmm_log)
            kill(handle)
            if isinstance(error, VmError):
                raise HypervisorError(
                    f"VM {handle.name!r} could not be restored: {error}{f'. Its log ends with:{chr(10)}{said}' if said else ''}",
                    vm_name=handle.name,
                ) from error
            raise

    def stop(self, handle: VmHandle) -> None:
        """SIGTERM, 10 s of patience, SIGKILL; then everything the VM had is removed, whatever became of the VMM."""
        self._end(handle, term_timeout_s=STOP_TIMEOUT_S)

    def kill(self, handle: VmHandle) -> None:
        """SIGKILL; then everything the VM had is removed."""
        self._end(handle, term_timeout_s=0)

    def _end(self, handle: VmHandle, *, term_timeout_s: float) -> None:
        if handle.process is None:
            raise VmNotFoundError(f"VM {handle.name!r} has no process: it was never started", vm_name=handle.name)
        # Of two threads that end it the second would find a TAP in use, by the first.
        with self._ends.setdefault(handle.machine_id, threading.RLock()):
            self._end_alone(handle, handle.process, term_timeout_s=term_timeout_s)

    def _end_alone(self, handle: VmHandle, process: ProcessIdentity, *, term_timeout_s: float) -> None:
        logger.info("%s: ending pid %d", handle.name, process.pid)
        refused: StateFailedError | None = None
        failures = []
        try:
            killed = end_process(process, self.programs, term_timeout_s=term_timeout_s, kill_timeout_s=KILL_TIMEOUT_S)
            # For a handle of another process a failure is only that its VMM outlives SIGKILL.
            if killed and term_timeout_s > 0 and handle.machine_id in self._booted_here:
                failures.append(f"the VMM (pid {process.pid}) ignored SIGTERM for {term_timeout_s:g} s and was killed")
        except StateFailedError as error:
            refused = error
        except TimeoutError as error:
            failures.append(f"the VMM: {error}")
        finally:
            # Also when the test is interrupted just here.
            failures += self._remove(handle)
        if refused is not None:
            refused.vm_name = handle.name
            raise refused
        if failures:
            raise StopFailedError(f"VM {handle.name!r}: {'; '.join(failures)}", vm_name=handle.name)

    def _remove(self, handle: VmHandle) -> list[str]:
        return take_all(
            [
                lambda: _end_sidecars(handle),
                lambda: remove_taps(handle.taps, handle.netns),
                lambda: records.remove_lease(handle.run_dir, search=False) if handle.run_dir is not None else None,
                lambda: self._forget(handle),
            ]
        )

    def _forget(self, handle: VmHandle) -> None:
        self.host.names.free(handle.namespace, handle.name, handle.process)
        self._scanners.pop(handle.machine_id, None)
        self._paused.discard(handle.machine_id)
        self._booted_here.discard(handle.machine_id)
        self._ends.pop(handle.machine_id, None)

    def state(self, handle: VmHandle) -> VmStatus:
        """STOPPED when the process is gone or another one; READY once the marker was seen; else RUNNING."""
        if handle.process is None:
            return VmStatus(VmState.STOPPED)
        try:
            if not is_running(handle.process, self.programs):
                return VmStatus(VmState.STOPPED)
        except StateFailedError:
            return VmStatus(VmState.STOPPED)
        ip = self.scanner(handle).scan()
        if handle.machine_id in self._paused:
            return VmStatus(VmState.PAUSED, ip)
        return VmStatus(VmState.READY if ip else VmState.RUNNING, ip)

    def scanner(self, handle: VmHandle) -> ReadyScanner:
        """Return the scanner of a VM's serial log, which remembers how far it has read."""
        known = self._scanners.get(handle.machine_id)
        if known is None or known.nonce != handle.nonce:
            known = ReadyScanner(handle.serial_log, handle.ready_marker, handle.nonce, nonce_required=handle.nonce is not None)
            self._scanners[handle.machine_id] = known
        return known

    def renew_sidecars(self, handle: VmHandle, shares: Sequence[ServedShare]) -> tuple[VmHandle, list[ServedShare]]:
        """Start a second virtiofsd at each socket, for a VMM that will connect anew; the first ends with its connection."""
        if not shares:
            return handle, []
        from pytest_chvm.host.virtiofsd import find_virtiofsd, serve_share

        program = find_virtiofsd(self.virtiofsd)
        fresh = [serve_share(program, served.share, served.socket, self.host) for served in shares]
        return replace(handle, sidecars=(*handle.sidecars, *(served.process for served in fresh))), fresh

    def set_paused(self, handle: VmHandle, paused: bool) -> None:
        """Remember whether a VM is paused."""
        (self._paused.add if paused else self._paused.discard)(handle.machine_id)


def _end_sidecars(handle: VmHandle) -> list[str]:
    if not handle.sidecars:
        return []
    from pytest_chvm.host.virtiofsd import PROGRAMS

    ended = end_all(handle.sidecars, PROGRAMS, term_timeout_s=SIDECAR_TIMEOUT_S, kill_timeout_s=SIDECAR_TIMEOUT_S)
    return [f"virtiofsd: {failure}" for failure in ended]


def _memory_of(boot: Boot) -> Memory | None:
    """Return the file that backs a VM's memory, if any: a new one for a template, the saved one for a clone."""
    if boot.restoring is not None:
        return _restored_memory(boot, boot.restoring)
    if boot.options.template_dir is None:
        return None
    memory = boot.options.template_dir / MEMORY_FILE
    with memory.open("xb") as file:
        file.truncate(boot.config.memory_mb << 20)
    return Memory(os.fspath(memory), shared=True)


def _restored_memory(boot: Boot, snapshot: Path) -> Memory | None:
    """Return what the memory of a restored VM is made of; None where it is in the saved state."""
    memory = snapshot / MEMORY_FILE
    if not memory.exists():
        return None
    if not boot.config.shared_dirs and not boot.config.hotplug:
        return Memory(os.fspath(memory), shared=False)
    # virtiofsd has to see what the guest writes (vhost-user), so that it needs a copy of its own.
    number = boot.add_fd(copied_to_memory(memory))
    return Memory(f"/proc/self/fd/{number}", shared=True)


def _start_log(log: Path, config: VmConfig, earlier: Path | None = None) -> None:
    # A ready line of an earlier VM must not count. The VMM appends, or truncates the file again.
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(earlier.read_bytes() if earlier is not None and earlier.exists() else b"")
    except OSError as error:
        raise HostError(
            f"VM {config.name!r}: the log {str(log)!r} cannot be written: {error.strerror}", vm_name=config.name
        ) from error

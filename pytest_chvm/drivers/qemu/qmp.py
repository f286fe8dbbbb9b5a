"""QMP, QEMU's control protocol, through the library that QEMU's own developers keep."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytest_chvm.base.untouched import monotonic_s, sockets_for_libraries
from pytest_chvm.errors import HypervisorError, VmIOError

with sockets_for_libraries():
    import asyncio

ANSWER_TIMEOUT_S = 10.0
CANCELLED_TIMEOUT_S = 1.0


def execute(vm_name: str, socket_path: Path, command: str, arguments: dict[str, object]) -> Any:
    """Run one QMP command and return its answer; raises what `session` does."""
    return session(vm_name, socket_path, lambda client: client.execute(command, arguments or None))


def session(
    vm_name: str,
    socket_path: Path,
    work: Callable[[Any], Awaitable[Any]],
    *,
    timeout_s: float = ANSWER_TIMEOUT_S,
    overdue: str = "QEMU did not answer",
) -> Any:
    """Connect to QEMU's QMP socket and return what `work` makes of the client.

    Raises HypervisorError where QEMU refuses a command or `work` has not ended within `timeout_s`, which `overdue` puts in words;
    VmIOError where QEMU is not there. Whatever interrupts the wait (Ctrl-C) ends it at once, and has the work cancelled.
    """
    return _InThread(_session(vm_name, socket_path, work, timeout_s, overdue)).result()


class _Loop(asyncio.SelectorEventLoop):
    """An event loop whose timeouts pass while a test's clock is frozen, whatever loop policy the test has set."""

    def time(self) -> float:
        return monotonic_s()


class _InThread:
    """A coroutine that runs in a thread of its own, since the test's thread may have a running event loop."""

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._work = work
        self._done: Future[Any] = Future()
        self._given_up = False
        self._task: asyncio.Task[Any] | None = None
        self._thread = threading.Thread(target=self._run, name="chvm-qmp", daemon=True)

    def _run(self) -> None:
        try:
            with sockets_for_libraries(), asyncio.Runner(loop_factory=_Loop) as runner:
                self._done.set_result(runner.run(self._cancellable()))
        except BaseException as error:  # it is raised where it is waited for
            self._done.set_exception(error)

    async def _cancellable(self) -> Any:
        self._task = asyncio.current_task()
        if self._given_up:
            self._work.close()
            raise asyncio.CancelledError
        return await self._work

    def result(self) -> Any:
        self._thread.start()
        try:
            return self._done.result()
        finally:
            self._given_up = True
            if self._task is not None and not self._done.done():
                # The loop may end at this moment.
                with suppress(RuntimeError):
                    self._task.get_loop().call_soon_threadsafe(self._task.cancel)
            # Descriptors that it was given are the caller's to close.
            self._thread.join(CANCELLED_TIMEOUT_S)


async def _session(vm_name: str, socket_path: Path, work: Callable[[Any], Awaitable[Any]], timeout_s: float, overdue: str) -> Any:
    from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient

    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
    # Without a name: with one it has a logger of its own, which the process keeps.
    client = QMPClient()
    try:
        async with asyncio.timeout(timeout_s):
            await client.connect(str(socket_path))
            return await work(client)
    except TimeoutError as error:
        raise HypervisorError(f"VM {vm_name!r}: {overdue} within {timeout_s:g} s", vm_name=vm_name) from error
    except ExecuteError as error:
        raise HypervisorError(f"VM {vm_name!r}: QEMU refused: {error}", vm_name=vm_name) from error
    except (ConnectError, ExecInterruptedError, EOFError, OSError) as error:
        raise VmIOError(f"VM {vm_name!r}: QEMU cannot be reached at {socket_path}: {error}", vm_name=vm_name) from error
    finally:
        try:
            await client.disconnect()
        except (EOFError, OSError) as error:
            logging.getLogger("pytest_chvm").debug("%s: QMP ended with %s", vm_name, error)


async def next_event(client: Any, listener: Any) -> Any:
    """Return the next event that an EventListener of a client has; raises EOFError when QEMU ends meanwhile."""
    from qemu.qmp import Runstate

    async def end() -> None:
        while client.runstate is Runstate.RUNNING:
            await client.runstate_changed()

    event, ended = asyncio.ensure_future(listener.get()), asyncio.ensure_future(end())
    try:
        await asyncio.wait([event, ended], return_when=asyncio.FIRST_COMPLETED)
        if not event.done():
            raise EOFError("it has ended")
        return event.result()
    finally:
        event.cancel()
        ended.cancel()


def forwarded_port(vm_name: str, answer: str, listing: str, port: int) -> tuple[str, int]:
    """Return the host's end of a forwarding from the monitor's `info usernet`; raises HypervisorError where it has none."""
    rows = re.findall(r"TCP\[HOST_FORWARD\]\s+\d+\s+(127\.0\.0\.1)\s+(\d{1,5})\s+\S+\s+(\d{1,5})\s", listing)
    for host, host_port, guest_port in reversed(rows):
        if int(guest_port) == port and 0 < int(host_port) < 65536:
            return host, int(host_port)
    raise HypervisorError(f"VM {vm_name!r}: QEMU did not forward port {port}: {answer.strip() or listing.strip()}", vm_name=vm_name)

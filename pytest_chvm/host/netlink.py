"""Netlink, by pyroute2, from any thread of a test's.

pyroute2 runs an event loop in the thread that calls it, which may have one running: a coroutine that is a test's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_chvm.base.untouched import sockets_for_libraries
from pytest_chvm.host.namespaces import inside

if TYPE_CHECKING:
    from pyroute2 import IPRoute


class Routes:
    """What of pyroute2's `IPRoute` is used here, called in the thread that has the socket.

    Answers are lists; what the kernel refuses is an OSError with its number.
    """

    def __init__(self, route: IPRoute, call: Callable[..., Any]) -> None:
        self._route = route
        self._call = call

    def link(self, command: str, **attributes: object) -> list[Any]:
        """Make, change or look up links."""
        return self._ask("link", command, **attributes)

    def addr(self, command: str, **attributes: object) -> list[Any]:
        """Give a link an address."""
        return self._ask("addr", command, **attributes)

    def link_lookup(self, **attributes: object) -> list[int]:
        """Return the indexes of the links that have all of these."""
        return self._ask("link_lookup", **attributes)

    def get_routes(self, **attributes: object) -> list[Any]:
        """Return the routes that have all of these."""
        return self._ask("get_routes", **attributes)

    def _ask(self, name: str, *arguments: object, **attributes: object) -> list[Any]:
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            # Some answers are made while they are read.
            return list(self._call(lambda: list(getattr(self._route, name)(*arguments, **attributes) or ())))
        except NetlinkError as error:
            raise OSError(error.code, str(error)) from error


@contextmanager
def route_socket(netns: str | None) -> Iterator[Routes]:
    """A netlink socket in the host's or a named network namespace; raises InvalidConfigError where there is none."""

    def connect() -> IPRoute:
        from pyroute2 import IPRoute

        with inside(netns):
            return IPRoute()

    with sockets_for_libraries(), ThreadPoolExecutor(1, "chvm-netlink") as thread:

        def call(work: Callable[[], Any]) -> Any:
            return thread.submit(work).result()

        route = call(connect)
        try:
            yield Routes(route, call)
        finally:
            call(route.close)

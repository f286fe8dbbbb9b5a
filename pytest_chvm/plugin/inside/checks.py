"""Which tests cannot run in a guest."""

from __future__ import annotations

import pytest

from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.plugin.keys import VM_FIXTURES
from pytest_chvm.plugin.marker import marker_arguments


def check_inside(item: pytest.Item) -> None:
    """Raise InvalidConfigError for a test that cannot run in a guest."""
    given = marker_arguments(item).get("inside")
    if given is not True and given != "module":
        raise InvalidConfigError(f"inside={given!r}, expected True (a VM for the test) or 'module' (one for the tests of a module)")
    if held := sorted(VM_FIXTURES.intersection(getattr(item, "fixturenames", ()))):
        raise InvalidConfigError(
            f"{item.nodeid} runs in a guest (inside={given!r}), where {', '.join(held)} cannot be: VMs are started out here. Let "
            "it have the one or the other; what the VM is to be is said by the marker's other arguments"
        )
    for option in ("usepdb", "trace"):
        if item.config.getoption(option, False):
            raise InvalidConfigError(
                f"--{option.removeprefix('use')} cannot be used with {item.nodeid}: it runs in a guest (inside={given!r}), where "
                "there is no terminal. Deselect it, or take the marker's `inside` away to debug it out here"
            )

"""Which kinds of network a VM's NICs can be leased on."""

from __future__ import annotations

from typing import get_args

from pytest_chvm.machine.nics import LEASES
from pytest_chvm.model import Attachment


def test_every_kind_that_a_config_can_name_can_be_leased():
    assert set(LEASES) == set(get_args(Attachment))

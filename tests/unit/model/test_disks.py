"""The kinds of disk."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from pytest_chvm.model import VmConfig
from pytest_chvm.model.disks import DATA, DISK_KINDS, ROOT, SEED


def test_each_kind_is_named_by_a_field_and_has_an_id_of_its_own():
    assert {kind.field for kind in DISK_KINDS} <= {field.name for field in fields(VmConfig)}
    assert len({kind.id for kind in DISK_KINDS}) == len(DISK_KINDS)


def test_disks_are_in_the_order_in_which_the_guest_sees_them():
    config = VmConfig(data_disk="data", seed_iso="seed", root_disk="root")
    assert [(disk.kind, disk.image) for disk in config.all_disks] == [
        (ROOT, Path("root").absolute()),
        (SEED, Path("seed").absolute()),
        (DATA, Path("data").absolute()),
    ]
    assert VmConfig().all_disks == ()


def test_writes_stay_on_a_data_disk_alone():
    config = VmConfig(data_disk="data", seed_iso="seed", root_disk="root")
    assert [disk.kind for disk in config.all_disks if disk.written] == [DATA]

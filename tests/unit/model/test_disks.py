"""The kinds of disk."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_chvm import Disk, InvalidConfigError
from pytest_chvm.clones.templates import template_config
from pytest_chvm.model import VmConfig, names_in_guest, plugged_into_clones
from pytest_chvm.model.disks import DATA, DISK_KINDS, ROOT, SEED, DiskBus


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


def test_further_disks_come_after_the_others_in_their_order():
    config = VmConfig(data_disk="data", disks=[Disk("image", serial="s"), Disk(size_mb=8, bus="nvme")])
    assert [str(disk) for disk in config.all_disks] == [
        f"data_disk '{Path('data').absolute()}'",
        f"disks[0] '{Path('image').absolute()}'",
        "disks[1], an empty one of 8 MiB",
    ]
    assert VmConfig(disks=Disk(size_mb=1)).disks == (Disk(size_mb=1),)
    assert Disk("image").path == Path("image").absolute()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a path, of an image, or size_mb"),
        ({"path": "image", "size_mb": 8}, "either a path, of an image, or size_mb"),
        ({"size_mb": 0}, "a size_mb of 1 or more"),
        ({"size_mb": True}, "a size_mb of 1 or more"),
        ({"size_mb": 8, "bus": "ide"}, "one of virtio, nvme, scsi, nvdimm, pmem"),
        ({"size_mb": 8, "block_size": 1000}, "one of 512, 1024, 2048, 4096"),
        ({"size_mb": 8, "serial": "a,b"}, "1 to 20 letters"),
        ({"size_mb": 8, "serial": "x" * 21}, "1 to 20 letters"),
        ({"size_mb": 8, "read_only": 1}, "True or False"),
        ({"size_mb": 8, "bus": "pmem", "serial": "a"}, "is memory: leave out read_only, serial and block_size"),
        ({"size_mb": 9, "bus": "nvdimm"}, "an even size_mb"),
    ],
)
def test_a_disk_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(InvalidConfigError, match=message):
        Disk(**arguments)


@pytest.mark.parametrize("disks", ["disk", [Path("disk")], 3])
def test_what_is_no_list_of_disks_is_refused(disks):
    with pytest.raises(InvalidConfigError, match="expected a"):
        VmConfig(disks=disks)
    with pytest.raises(InvalidConfigError, match="a serial twice: a, a"):
        VmConfig(disks=[Disk(size_mb=8, serial="a"), Disk(size_mb=8, serial="a")])


buses = st.sampled_from(get_args(DiskBus))
disk_lists = st.lists(
    st.builds(Disk, size_mb=st.just(8), bus=buses)
    | st.builds(Disk, path=st.just("image"), read_only=st.booleans(), bus=st.sampled_from(["virtio", "nvme", "scsi"])),
    max_size=8,
)


@given(disk_lists)
def test_a_clone_finds_its_disks_by_the_names_that_a_booted_vm_does(disks):
    all_disks = VmConfig(disks=disks).all_disks
    names = dict(zip(names_in_guest(all_disks), all_disks, strict=True))
    plugged = plugged_into_clones(all_disks)
    saved = [disk for disk in all_disks if disk not in plugged]
    assert not any(disk.written or disk.kind.bus == "nvme" for disk in saved)
    assert dict(zip(names_in_guest([*saved, *plugged]), [*saved, *plugged], strict=True)) == names
    assert len({disk.kind.id for disk in all_disks}) == len(all_disks)


@given(disk_lists)
def test_a_template_calls_its_disks_what_its_clones_do(disks):
    config = VmConfig(disks=disks)
    plugged = plugged_into_clones(config.all_disks)
    ids = [disk.kind.id for disk in config.all_disks if disk not in plugged]
    assert [disk.kind.id for disk in template_config(config).all_disks] == ids

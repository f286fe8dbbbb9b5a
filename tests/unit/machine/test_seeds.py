"""The seed that is made of what cloud-init is to be told."""

import io
import subprocess

import pycdlib
import pytest
import yaml

from pytest_chvm import InvalidConfigError, VmConfig
from pytest_chvm.host.host import default_host
from pytest_chvm.host.ssh_key import run_key
from pytest_chvm.machine import seeds
from pytest_chvm.machine.seeds import with_seed


def read_seed(path):
    iso = pycdlib.PyCdlib()
    iso.open(str(path))
    files = {}
    for entry in iso.list_children(joliet_path="/"):
        name = entry.file_identifier().decode("utf-16_be")
        if entry.is_file():
            content = io.BytesIO()
            iso.get_file_from_iso_fp(content, joliet_path=f"/{name}")
            files[name] = content.getvalue().decode()
    label = iso.pvd.volume_identifier.decode().strip()
    iso.close()
    return label, files


@pytest.fixture
def seeded(tmp_path):
    def make(**fields):
        return with_seed(VmConfig(root_disk="disk", **fields), tmp_path, default_host())

    return make


def test_a_seed_has_what_was_given_and_the_key_of_the_run(seeded):
    config = seeded(
        user_data={"packages": ["nginx"]}, meta_data={"public-keys": "ssh-ed25519 AAAA me"}, network_config={"version": 2}
    )
    label, files = read_seed(config.seed_iso)
    assert (label, sorted(files)) == ("cidata", ["meta-data", "network-config", "user-data"])
    assert files["user-data"] == config.user_data
    assert yaml.safe_load(files["network-config"]) == {"version": 2}
    meta = yaml.safe_load(files["meta-data"])
    assert meta["public-keys"] == ["ssh-ed25519 AAAA me", run_key(default_host()).public]
    assert meta["instance-id"].startswith("chvm-")


def test_the_kernel_takes_a_seed_for_what_it_is(seeded):
    said = subprocess.run(
        ["blkid", "-p", "-o", "export", seeded(user_data="#!/bin/sh\n").seed_iso], capture_output=True, text=True, check=True
    )
    assert {"LABEL=cidata", "TYPE=iso9660"} <= set(said.stdout.split())


def test_the_same_words_are_the_same_seed_so_that_vms_with_it_can_be_clones(seeded):
    one, same, other = seeded(user_data="#!/bin/sh\n"), seeded(user_data="#!/bin/sh\n", name="b"), seeded(user_data="#!/bin/bash\n")
    assert one.seed_iso == same.seed_iso != other.seed_iso


def test_without_words_there_is_no_seed(seeded, tmp_path):
    assert seeded().seed_iso is None
    assert list(tmp_path.iterdir()) == []


def test_seeds_used_longest_ago_are_removed(seeded, monkeypatch):
    monkeypatch.setattr(seeds, "MOST_SEEDS", 2)
    made = [seeded(user_data=f"#!/bin/sh\necho {number}\n").seed_iso for number in range(3)]
    assert [seed.exists() for seed in made] == [False, True, True]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seed_iso": "seed.iso"}, "VM 'web': user_data would make a seed, and it has one"),
        (
            {"root_disk": None},
            "VM 'web': user_data is for an image's cloud-init, and the built-in guest has none: name a root_disk",
        ),
    ],
)
def test_a_seed_that_nobody_would_read_is_refused(fields, said, tmp_path):
    config = VmConfig(**{"name": "web", "root_disk": "disk", "user_data": "#!/bin/sh\n", **fields})
    with pytest.raises(InvalidConfigError, match=said):
        with_seed(config, tmp_path, default_host())

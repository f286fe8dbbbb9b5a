"""What an image that its own boot loader boots is told, by its seed."""

import io

import pycdlib
import pytest
import yaml

from pytest_chvm import VmConfig
from pytest_chvm.guest.kinds.firmware import FirmwareGuest
from pytest_chvm.guest.kinds.stock import StockGuest


@pytest.fixture
def read_seed(tmp_path):
    def read(words, **fields):
        (tmp_path / "busybox").write_bytes(b"busybox")
        guest = FirmwareGuest(
            VmConfig(name="web_1", root_disk="disk", firmware="uefi", **fields), "0" * 16, None, tmp_path / "busybox"
        )
        told = guest.told_otherwise([*guest.boot_words("CHVM_READY", []), *words], tmp_path)
        assert told.seed_iso == tmp_path / "seed.iso"
        iso = pycdlib.PyCdlib()
        iso.open(str(told.seed_iso))
        files = {}
        for directory, _names, names in iso.walk(joliet_path="/"):
            for name in names:
                content = io.BytesIO()
                iso.get_file_from_iso_fp(content, joliet_path=f"{directory.rstrip('/')}/{name}")
                files[f"{directory.strip('/')}/{name}".lstrip("/")] = content.getvalue().decode(errors="replace")
        iso.close()
        return files

    return read


def test_its_seed_has_its_words_and_what_else_an_initramfs_would_have_put_there(read_seed):
    files = read_seed(["chvm.net=eth0,192.0.2.2/30,192.0.2.1"])
    assert "chvm.net=eth0,192.0.2.2/30,192.0.2.1\n" in files["chvm/words"]
    assert f"chvm.nonce={'0' * 16}\n" in files["chvm/words"]
    assert {"chvm/busybox", "chvm/renew", "chvm/stock.sh", "chvm/configure_any.sh", "chvm/chvm-ready.service"} <= files.keys()
    assert files["vendor-data"].startswith("#cloud-boothook\n#!/bin/sh\n")
    assert yaml.safe_load(files["meta-data"]) == {"instance-id": f"chvm-{'0' * 16}", "local-hostname": "web-1"}
    assert (yaml.safe_load(files["network-config"]), files["user-data"]) == ({"config": "disabled"}, "#cloud-config\n")


def test_what_the_user_says_comes_first(read_seed):
    files = read_seed([], user_data="#!/bin/sh\n", meta_data={"local-hostname": "mine"}, network_config={"version": 2})
    assert files["user-data"] == "#!/bin/sh\n"
    assert yaml.safe_load(files["meta-data"])["local-hostname"] == "mine"
    assert yaml.safe_load(files["network-config"]) == {"version": 2}


def test_a_stock_image_sets_up_its_network_itself_only_where_it_is_told_how():
    told, not_told = (
        StockGuest(VmConfig(root_disk="disk", **more)).own_words() for more in ({"network_config": {"version": 2}}, {})
    )
    assert "network-config=disabled" not in told
    assert "network-config=disabled" in not_told

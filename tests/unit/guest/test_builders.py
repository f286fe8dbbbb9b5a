"""Disk images of whole systems: what is refused before anything is fetched, and the disk that is made of a tree of files."""

import io
import json
import subprocess
import tarfile

import pytest

from pytest_chvm import HostError, InvalidConfigError, MissingRequirementError
from pytest_chvm.cli import main
from pytest_chvm.guest.builders import tools
from pytest_chvm.guest.builders.debian import DebianRecipe, build_debian
from pytest_chvm.guest.builders.disk import LOADER, Layout, copy_image, make_disk

UUID = "6dfc8d29-8bd4-4f5d-9a52-8e3b0c0f7d11"
FILES = {
    "boot/vmlinuz-6.1.0-1-cloud-amd64": b"a kernel",
    "boot/initrd.img-6.1.0-1-cloud-amd64": b"an initramfs",
    LOADER: b"a boot loader",
    "home/user/hello": b"hello",
}


@pytest.fixture
def archive(tmp_path):
    """A system's files, some of which are not root's."""
    path = tmp_path / "root.tar"
    with tarfile.open(path, "w") as tar:
        for directory in ("boot", "usr", "usr/lib", "usr/lib/systemd", "usr/lib/systemd/boot", "usr/lib/systemd/boot/efi", "home"):
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for name, content in FILES.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.uid, entry.gid, entry.mode = len(content), *((1000, 1000) if "user" in name else (0, 0)), 0o640
            tar.addfile(entry, io.BytesIO(content))
        secret = tarfile.TarInfo("secret")
        secret.size, secret.mode, secret.gid = 2, 0, 42
        tar.addfile(secret, io.BytesIO(b"42"))
        device = tarfile.TarInfo("null")
        device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 3
        tar.addfile(device)
    return path


def test_a_disk_has_an_efi_system_partition_that_boots_and_a_root_with_the_files_of_the_archive(archive, tmp_path):
    image = tmp_path / "image.qcow2"
    make_disk(archive, Layout(256, UUID, "Debian test", "ro console=ttyS0"), tmp_path, image)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.qcow2"]
    raw = copy_image(image, tmp_path / "copy.raw")
    assert raw.stat().st_size == 256 << 20
    table = json.loads(subprocess.check_output(["sfdisk", "--json", raw], env={"PATH": tools.search_path()}))["partitiontable"]
    assert (table["label"], [part["name"] for part in table["partitions"]]) == ("gpt", ["esp", "root"])
    esp, root = (part["start"] * 512 for part in table["partitions"])

    def on_esp(name):
        return subprocess.check_output(["mtype", "-i", f"{raw}@@{esp}", f"::/{name}"]).decode()

    assert on_esp("EFI/BOOT/BOOTX64.EFI") == "a boot loader"
    entry = on_esp("loader/entries/6.1.0-1-cloud-amd64.conf")
    assert f"options root=UUID={UUID} ro console=ttyS0\n" in entry
    for word, content in (("linux", "a kernel"), ("initrd", "an initramfs")):
        (place,) = (line.split()[1] for line in entry.splitlines() if line.startswith(f"{word} "))
        assert on_esp(place.lstrip("/")) == content

    def ask(request):
        words = ["debugfs", "-R", request, f"{raw}?offset={root}"]
        return subprocess.check_output(words, env={"PATH": tools.search_path()}, stderr=subprocess.DEVNULL).decode()

    assert ask("cat /home/user/hello") == "hello"
    assert "User:  1000   Group:  1000" in ask("stat /home/user/hello")
    assert "User:     0   Group:     0" in ask("stat /boot")
    assert "Type: character special" in ask("stat /null")
    assert "Mode:  0000" in ask("stat /secret")
    assert ask("cat /secret") == "42"


def test_a_disk_that_is_too_small_is_refused_with_what_it_needs(archive, tmp_path):
    with pytest.raises(InvalidConfigError, match=r"size_mb=200 is too small for what is installed: it needs 22\d"):
        make_disk(archive, Layout(200, UUID, "Debian test", ""), tmp_path, tmp_path / "image.qcow2")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "12"], "suite '12' is none of Debian's"),
        (["--packages", "nginx, rm -rf"], "'rm -rf' is no package's name"),
        (["--without", "systemd"], "systemd cannot be left out"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_fetched(arguments, said, capsys):
    assert main(["guest", "build", "debian", *arguments]) == 125
    assert said in capsys.readouterr().err


def test_missing_programs_are_named_with_their_packages(monkeypatch, tmp_path):
    monkeypatch.setattr(tools, "PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingRequirementError, match=r"needs mmdebstrap, .*: install mmdebstrap .*mtools"):
        build_debian(DebianRecipe(), tmp_path, lambda text: None)
    assert not list((tmp_path / "built").glob("debian*[!k]"))


def test_a_program_that_fails_is_named_with_what_it_said_last():
    heard = []
    with pytest.raises(HostError, match=r"sh failed with status 3; it said last:\nto stdout\nto stderr"):
        tools.run_tool(["sh", "-c", "cat; echo to stderr >&2; exit 3"], "to stdout\n", heard.append)
    assert heard == ["to stdout", "to stderr"]

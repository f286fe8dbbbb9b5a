"""What Cloud Hypervisor is started with, word by word."""

import hashlib
import json
import os
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from pytest_chvm import (
    BootFailedError,
    CloudHypervisorDriver,
    Cpus,
    Disk,
    InvalidConfigError,
    MissingRequirementError,
    SharedDir,
    SocketPairFd,
    Tap,
    UnsupportedError,
)
from pytest_chvm.drivers.cloud_hypervisor import driver as cloud_hypervisor
from pytest_chvm.drivers.cloud_hypervisor import landlock as ch_landlock


@pytest.fixture
def arguments(ch, stand_in_ch):
    """Boot a VM; returns the arguments, but for those after them that are ours to talk to it, and the handle."""

    def boot(**config):
        handle = ch.boot(**config)
        words = stand_in_ch.record(handle.process.pid)["argv"][1:]
        return words[: words.index("--api-socket")], handle

    return boot


@pytest.fixture
def image(tmp_path):
    def make(name, size=1 << 20):
        path = tmp_path / name
        path.write_bytes(bytes(size))
        return path

    return make


def values_of(words, option):
    return [words[index + 1] for index, word in enumerate(words) if word == option]


def options_of(words):
    """Each option with its values: as many as follow it, and one list for all times that it is there."""
    options = {}
    for word in words:
        if word.startswith("--"):
            values = options.setdefault(word, [])
        else:
            values.append(word)
    return options


def test_a_vm_of_the_least_config_has_no_devices(arguments, ch):
    words, handle = arguments()
    assert options_of(words) == {
        "--kernel": [str(ch.defaults["kernel"])], "--cmdline": ["console=ttyS0"], "--cpus": ["boot=1"], "--memory": ["size=256M"],
        "--serial": [f"file={handle.serial_log}"], "--console": ["off"],
    }  # fmt: skip


def test_a_vm_of_the_whole_config_has_all_of_it_and_the_root_disk_first(
    arguments, ch, image, tmp_path, tap_name, stand_in_virtiofsd
):
    share = tmp_path / "share"
    share.mkdir()
    initramfs, root, seed, data = (image(name) for name in ("initrd", "root.img", "seed.iso", "data.img"))
    words, handle = arguments(
        initramfs=initramfs, cpus=2, memory_mb=300, root_disk=root, seed_iso=seed, data_disk=data,
        networks=[Tap(tap_name, mac="52:54:00:aa:bb:CC")], shared_dirs=[SharedDir("code", share)], cmdline="console=ttyS0 quiet",
    )  # fmt: skip
    options = options_of(words)
    assert options["--cmdline"] == ["console=ttyS0 quiet"]
    assert options["--initramfs"] == [str(initramfs)]
    assert options["--cpus"] == ["boot=2"]
    # virtiofsd has to see it.
    assert set(options["--memory"][0].split(",")) == {"size=300M", "shared=on"}
    # The guest names them in this order.
    first, second, third = options["--disk"]
    assert f"path={handle.run_dir}/root.qcow2" in first
    assert {f"path={seed}", "readonly=on"} <= set(second.split(","))
    assert f"path={data}" in third.split(",")
    assert "readonly" not in third
    assert set(options["--net"][0].split(",")) == {f"tap={tap_name}", "mac=52:54:00:aa:bb:cc"}
    assert {"tag=code", f"socket={handle.run_dir}/fs0.sock"} <= set(options["--fs"][0].split(","))


def test_default_command_line_of_a_guest_with_a_root_disk(arguments, image):
    words, _handle = arguments(root_disk=image("root.img"))
    assert values_of(words, "--cmdline") == ["console=ttyS0 root=/dev/vda1 rw ds=nocloud"]


def test_an_empty_command_line_is_the_users(arguments):
    words, _handle = arguments(cmdline="")
    assert values_of(words, "--cmdline") == [""]


def test_root_disk_is_an_overlay_that_leaves_it_unwritten(arguments, image):
    root = image("root.img")
    before = root.stat()
    _words, handle = arguments(root_disk=root)
    overlay = handle.run_dir / "root.qcow2"
    about = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", overlay]))
    assert (about["format"], about["backing-filename"], about["backing-filename-format"]) == ("qcow2", str(root), "raw")
    assert root.stat().st_mtime_ns == before.st_mtime_ns


def test_base_image_that_is_qcow2_is_named_so(arguments, tmp_path):
    root = tmp_path / "root.img"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", root, "1M"], check=True)
    _words, handle = arguments(root_disk=root)
    about = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", handle.run_dir / "root.qcow2"]))
    assert about["backing-filename-format"] == "qcow2"


def test_data_disk_named_qcow2_is_given_as_one(arguments, tmp_path):
    data = tmp_path / "data.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", data, "1M"], check=True)
    words, _handle = arguments(data_disk=data)
    assert values_of(words, "--disk") == [f"path={data},image_type=qcow2,backing_files=on"]


def test_data_disk_that_a_guest_has_turned_into_a_qcow2_is_refused(ch, tmp_path):
    data = tmp_path / "data.img"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", data, "1M"], check=True)
    with pytest.raises(InvalidConfigError, match=r"begins like a qcow2 image and is named like a raw one"):
        ch.boot(data_disk=data)


def test_further_disks_are_what_it_has_of_such(arguments, image):
    data = image("data.img")
    words, handle = arguments(disks=[Disk(data, serial="one"), Disk(size_mb=8, bus="pmem"), Disk(data, read_only=True)])
    assert values_of(words, "--disk") == [f"path={data},image_type=raw,serial=one", f"path={data},readonly=on,image_type=raw"]
    assert values_of(words, "--pmem") == [f"file={handle.run_dir}/disk0.empty.raw"]


@pytest.mark.parametrize(
    ("disk", "message"),
    [
        (Disk(size_mb=8, bus="nvme"), r"cannot have disks\[0\].* on bus 'nvme': use pmem or virtio, or another VMM"),
        (Disk(size_mb=8, block_size=4096), "blocks of 4096 bytes: leave out block_size"),
    ],
)
def test_what_it_does_not_have_of_disks_is_refused(ch, stand_in_ch, disk, message):
    with pytest.raises(UnsupportedError, match=message):
        ch.boot(disks=[disk])
    assert stand_in_ch.records() == []


def test_processors_memory_and_devices_of_ones_own(arguments, tmp_path):
    words, handle = arguments(
        cpus=Cpus(sockets=2, cores=3, threads=2, numa_nodes=2), memory_mb=512, balloon=True, iommu=True, vmm_args=["--watchdog", "a b"]
    )  # fmt: skip
    options = options_of(words)
    assert options["--cpus"] == ["boot=12,topology=2:3:1:2"]
    assert options["--memory"] == ["size=0"]
    assert options["--memory-zone"] == ["id=memory0,size=256M", "id=memory1,size=256M"]
    assert options["--numa"] == [
        "guest_numa_id=0,cpus=[0-5],memory_zones=[memory0]",
        "guest_numa_id=1,cpus=[6-11],memory_zones=[memory1]",
    ]
    assert (options["--balloon"], options["--rng"]) == (["size=0"], ["src=/dev/urandom,iommu=on"])
    # As a person would type them.
    assert shlex.join(handle.command).endswith(" --watchdog 'a b'")


@pytest.mark.parametrize("config", [{"rng": False}, {"cpu": "max,-avx2"}, {"gdb": True}])
def test_what_it_does_not_have_of_machines_is_refused(ch, stand_in_ch, config):
    with pytest.raises(UnsupportedError, match="cloud-hypervisor cannot"):
        ch.boot(**config)
    assert stand_in_ch.records() == []


def test_mac_is_from_the_name_and_the_same_on_every_run(arguments, needs_taps):
    words, _handle = arguments(name="web", networks=[Tap(), Tap(), Tap()])
    for index, key in enumerate(("web", "web#1", "web#2")):
        digest = hashlib.sha256(key.encode()).hexdigest()
        expected = f"52:54:00:{digest[0:2]}:{digest[2:4]}:{digest[4:6]}"
        assert values_of(words, "--net")[index].endswith(f",mac={expected}")


def test_memory_is_shared_only_with_shared_dirs(arguments, tmp_path, stand_in_virtiofsd):
    words, _handle = arguments(shared_dirs={"a": tmp_path})
    assert values_of(words, "--memory") == ["size=256M,shared=on"]


def test_in_a_namespace_it_is_started_by_ip(ch, stand_in_ch, netns):
    handle = ch.boot(netns=netns)
    assert handle.command[:5] == ("ip", "netns", "exec", netns, str(stand_in_ch.path))
    record = stand_in_ch.record(handle.process.pid)
    # `ip` has become the VMM: it is the process that is signalled.
    assert record["pid"] == handle.process.pid
    assert os.stat(f"/proc/{handle.process.pid}/ns/net").st_ino == os.stat(f"/run/netns/{netns}").st_ino


def test_namespace_that_does_not_exist_is_refused(ch):
    with pytest.raises(InvalidConfigError, match=r"'nowhere' does not exist: make it with 'ip netns add nowhere'"):
        ch.boot(netns="nowhere")


def test_socket_pair_is_refused(ch, stand_in_ch):
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(InvalidConfigError, match="not on Linux: use a Tap"):
        ch.boot(networks=[SocketPairFd(theirs.fileno())])
    assert stand_in_ch.records() == []


def test_console_for_the_shell_is_a_pty(ch, stand_in_ch):
    from pytest_chvm.drivers.boot import BootOptions

    handle = ch.driver.boot(ch.config(), BootOptions(console=True))
    ch.handles.append(handle)
    words = stand_in_ch.record(handle.process.pid)["argv"]
    assert values_of(words, "--console") == ["pty"]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("plain", "{}"),
        ("with space", "{}"),
        ("a=b", "{}"),
        ("it's", "{}"),
        ("back\\slash", "{}"),
        ("new\nline", "{}"),
        ("comma,comma", '"{}"'),
        ("[brackets]", '"{}"'),
        ('say "hi"', '"{}"'),
        ("größe", "{}"),
    ],
)
def test_paths_are_quoted_as_its_option_parser_wants(arguments, tmp_path, name, written):
    directory = tmp_path / name
    directory.mkdir()
    kernel, data = directory / "vmlinuz", directory / "data"
    kernel.write_bytes(bytes(0x202) + b"HdrS")
    data.write_bytes(bytes(4096))
    words, _handle = arguments(kernel=kernel, data_disk=data, serial_log=directory / "serial.log")

    def quoted(path):
        return written.format(str(path).replace('"', '""') if '"' in written else path)

    # These two take their value as it is.
    assert values_of(words, "--kernel") == [str(kernel)]
    assert values_of(words, "--disk") == [f"path={quoted(data)},image_type=raw"]
    assert values_of(words, "--serial") == [f"file={quoted(directory / 'serial.log')}"]


def test_path_that_is_not_utf8_is_refused_before_anything_is_started(ch, stand_in_ch, tmp_path):
    kernel = tmp_path / os.fsdecode(b"vmlinuz-\xff")
    kernel.write_bytes(bytes(0x202) + b"HdrS")
    with pytest.raises(InvalidConfigError, match="not valid UTF-8, which Cloud Hypervisor cannot take: rename it"):
        ch.boot(kernel=kernel)
    assert stand_in_ch.records() == []


def test_it_gets_its_api_socket_and_no_other_descriptor(ch, stand_in_ch, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_TEST", "x")
    with socket.socket() as inherited:
        inherited.set_inheritable(True)
        handle = ch.boot()
        record = stand_in_ch.record(handle.process.pid)
    api, events = (values_of(record["argv"], option)[0].removeprefix("fd=") for option in ("--api-socket", "--event-monitor"))
    kinds = {number: target for number, target in record["descriptors"].items() if "/proc/" not in target}
    assert kinds.pop("0") == "/dev/null"
    assert kinds.pop("1") == kinds.pop("2") == str(handle.vmm_log)
    assert kinds.pop(api).startswith("socket:")
    assert kinds.pop(events).startswith(f"{handle.run_dir}/")
    assert kinds == {}
    assert record["cwd"] == "/"
    assert record["environment"].keys() <= {"PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE"}
    assert f"{handle.run_dir}/api.sock" in Path("/proc/net/unix").read_text()


@pytest.fixture
def landlock(monkeypatch):
    """Have the kernel's version of Landlock be one of the test's."""
    return lambda abi: monkeypatch.setattr(ch_landlock, "landlock_abi", lambda: abi)


def test_where_the_kernel_has_landlock_it_is_told_what_else_it_opens(ch, stand_in_ch, image, tmp_path, tap_name, landlock):
    landlock(3)
    base, root = image("base.img"), tmp_path / "a,b.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.name, root], check=True)
    handle = ch.boot(root_disk=root, networks=[Tap(tap_name)])
    words = stand_in_ch.record(handle.process.pid)["argv"]
    assert words[words.index("--landlock") :] == [
        "--landlock", "--landlock-rules", f"path={handle.run_dir},access=rw", f'path="{root}",access=r', f"path={base},access=r",
        f"path=/sys/devices/virtual/net/{tap_name},access=r",
    ]  # fmt: skip
    assert "--landlock" not in handle.command


@pytest.mark.parametrize(("abi", "hotplug"), [(2, False), (0, False), (6, True)], ids=["too old", "none", "hotplug"])
def test_landlock_is_left_out_where_it_would_be_refused_or_in_the_way(ch, stand_in_ch, landlock, abi, hotplug):
    landlock(abi)
    handle = ch.boot(hotplug=hotplug)
    assert not [word for word in stand_in_ch.record(handle.process.pid)["argv"] if word.startswith("--landlock")]


def test_what_it_says_goes_beside_the_serial_log(ch, stand_in_ch, tmp_path):
    stand_in_ch.does(says="to stderr\n")
    handle = ch.boot(serial_log=tmp_path / "logs" / "a.serial.log")
    stand_in_ch.record(handle.process.pid)
    assert handle.vmm_log == tmp_path / "logs" / "a.serial.vmm.log"
    assert handle.vmm_log.read_text() == "to stderr\n"


@pytest.fixture
def only_in(monkeypatch, tmp_path):
    """Have the executable looked for in an empty directory on PATH and in two of the test's."""
    places = tmp_path / "usr-bin", tmp_path / "usr-local-bin"
    for place in places:
        place.mkdir()
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setattr(cloud_hypervisor, "PLACES", tuple(map(str, places)))
    monkeypatch.setenv("PATH", str(empty))
    return places


def test_places_are_those_of_distributions():
    assert cloud_hypervisor.PLACES == ("/usr/bin", "/usr/local/bin")


def test_no_executable_names_the_places_and_where_to_get_it(ch, only_in):
    with pytest.raises(MissingRequirementError) as caught:
        ch.boot()
    for part in ("on PATH", *map(str, only_in), "https://github.com/cloud-hypervisor/cloud-hypervisor/releases", "--chvm-binary"):
        assert part in str(caught.value)


def test_executable_beside_path_is_found_in_order(ch, stand_in_ch, only_in):
    for place in only_in:
        shutil.copy(stand_in_ch.path, place)
        shutil.copy(stand_in_ch.directory / "cloud-hypervisor.json", place)
    assert ch.driver.binary().path == only_in[0] / "cloud-hypervisor"
    (only_in[0] / "cloud-hypervisor").unlink()
    assert ch.driver.binary().path == only_in[1] / "cloud-hypervisor"


def test_executable_on_path_comes_first(ch, stand_in_ch):
    assert ch.driver.binary().path == stand_in_ch.path


def test_executable_that_fails_is_reported_and_not_skipped(ch, stand_in_ch, only_in, monkeypatch):
    working = only_in[0] / "cloud-hypervisor"
    shutil.copy(stand_in_ch.path, working)
    shutil.copy(stand_in_ch.directory / "cloud-hypervisor.json", only_in[0])
    monkeypatch.setenv("PATH", str(stand_in_ch.directory))
    stand_in_ch.does(version="cannot load libfoo.so", version_status=127)
    stand_in_ch.path.touch()
    with pytest.raises(MissingRequirementError, match=r"does not work: '--version' ended with status 127: cannot load libfoo.so"):
        ch.boot()


def test_executable_named_by_the_user_is_the_one(ch, stand_in_ch, tmp_path):
    other = tmp_path / "my-hypervisor"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    with pytest.raises(MissingRequirementError, match="my-hypervisor"):
        CloudHypervisorDriver(binary=other).boot(ch.config())


def test_executable_that_is_too_old_is_refused(ch, stand_in_ch):
    stand_in_ch.does(version="cloud-hypervisor v51.1.0")
    stand_in_ch.path.touch()
    with pytest.raises(MissingRequirementError, match=r"v51.1.0.*v52.0 or newer is needed"):
        ch.boot()


def test_executable_that_cannot_be_executed_is_a_failed_boot(ch, stand_in_ch, monkeypatch):
    # It answered when it was asked for its version, and is broken since.
    found = ch.driver.binary()
    stand_in_ch.path.write_bytes(b"\x7fELF")
    monkeypatch.setattr(CloudHypervisorDriver, "binary", lambda self: found)
    with pytest.raises(BootFailedError, match="Exec format error"):
        ch.boot()

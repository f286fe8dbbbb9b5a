"""What a VM is made of: what can never be right is refused, with words that help."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_chvm import (
    CommandResult,
    InvalidConfigError,
    Network,
    ProcessIdentity,
    SharedDir,
    SocketPairFd,
    Tap,
    VmConfig,
    VmHandle,
    VmState,
)
from pytest_chvm.model import check_argument_names, mac_for


def test_every_field_has_a_default():
    config = VmConfig()
    assert (config.cpus, config.memory_mb, config.networks, config.shared_dirs) == (1, 256, None, ())


@pytest.mark.parametrize("key", ["name", "namespace"])
@pytest.mark.parametrize(
    "value",
    [
        "",
        "a/b",
        "/",
        "..",
        ".",
        ".hidden",
        "a b",
        " a",
        "a\n",
        "a\0",
        "-a",
        "größe",
        "x" * 64,
        "x" * 300,
        None,
        5,
        b"a",
        "a;b",
        "$(id)",
    ],
)
def test_names_that_cannot_be(key, value):
    with pytest.raises(InvalidConfigError, match=rf"{key}=.* cannot be a VM's {key}: expected 1 to 63 letters, digits") as caught:
        VmConfig(**{key: value})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", ["a", "A-1_b.c", "0", "x" * 63, "test_foo-1.2"])
def test_names_that_can_be(value):
    assert VmConfig(name=value).name == value


@pytest.mark.parametrize("key", ["cpus", "memory_mb"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "2", None, True, float("nan"), [], "many"])
def test_sizes_that_cannot_be(key, value):
    with pytest.raises(InvalidConfigError, match=rf"VM 'vm': {key}=.*, expected a whole number of 1 or more"):
        VmConfig(**{key: value})


@pytest.mark.parametrize("key", ["kernel", "initramfs", "root_disk", "seed_iso", "data_disk", "serial_log"])
def test_paths(key, tmp_path):
    class Place:
        def __fspath__(self):
            return "relative/file"

    assert getattr(VmConfig(**{key: str(tmp_path)}), key) == tmp_path
    assert getattr(VmConfig(**{key: Place()}), key) == Path.cwd() / "relative/file"
    assert os.fsencode(getattr(VmConfig(**{key: b"/a/\xff"}), key)) == b"/a/\xff"
    for wrong in ("", 5, "a\0b", ["a"]):
        with pytest.raises(InvalidConfigError, match=key):
            VmConfig(**{key: wrong})


@pytest.mark.parametrize("value", ["a\nb", "a\0b", 5, ["quiet"]])
def test_command_lines_that_cannot_be(value):
    for key in ("cmdline", "cmdline_extra"):
        with pytest.raises(InvalidConfigError, match=f"{key}[= ]"):
            VmConfig(**{key: value})


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (["cmd_line"], "has 'cmd_line', which is nothing that a clone is asked for; did you mean 'cmdline'"),
        (["colour"], "there are: boot_id, btf, "),
        ([None], "has None"),
        ("cmdline", "expected a list of words, of boot_id, "),
        (5, "expected a list of words"),
    ],
)
def test_what_no_clone_is_asked_for(value, why):
    with pytest.raises(InvalidConfigError, match=f"VM 'vm': clone_must_have.*{why}"):
        VmConfig(clone_must_have=value)


@pytest.mark.parametrize("tag", ["", "x" * 37, "a b", "a/b", "..", ".a", "-a", "a,b", "größe", "a\n", None, 5, b"a"])
def test_tags_that_cannot_be(tag):
    with pytest.raises(InvalidConfigError, match="cannot be a tag: expected 1 to 36 letters, digits"):
        SharedDir(tag, "/")
    with pytest.raises(InvalidConfigError, match="cannot be a tag"):
        VmConfig(shared_dirs={tag: "/"})


def test_longest_tag():
    assert len(SharedDir("x" * 36, "/").tag) == 36


def test_tag_used_twice():
    with pytest.raises(InvalidConfigError, match="tag 'a' is used twice"):
        VmConfig(shared_dirs=[SharedDir("a", "/tmp"), SharedDir("b", "/"), SharedDir("a", "/")])


def test_shared_dirs_as_a_mapping_and_as_a_list():
    assert VmConfig(shared_dirs={"a": "/tmp"}).shared_dirs == (SharedDir("a", Path("/tmp")),)
    assert VmConfig(shared_dirs=[SharedDir("a", "/tmp", read_only=True)]).shared_dirs[0].read_only
    for wrong in ("/tmp", ["/tmp"], 5, [("a", "/tmp")]):
        with pytest.raises(InvalidConfigError, match="shared_dirs"):
            VmConfig(shared_dirs=wrong)
    with pytest.raises(InvalidConfigError, match="read_only"):
        SharedDir("a", "/", read_only="no")


@pytest.mark.parametrize(
    "mac",
    ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "52-54-00-12-34-56", "gg:54:00:12:34:56", "525400123456", 5, "5:54:00:12:34:56"],
)
def test_mac_that_is_none(mac):
    with pytest.raises(InvalidConfigError, match=r"is no MAC address: expected six bytes like 52:54:00:12:34:56"):
        Tap(mac=mac)


@pytest.mark.parametrize("mac", ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "53:54:00:12:34:56"])
def test_mac_that_is_multicast(mac):
    with pytest.raises(InvalidConfigError, match="multicast"):
        Tap(mac=mac)


def test_mac_of_zeros():
    with pytest.raises(InvalidConfigError, match="all zeros"):
        Tap(mac="00:00:00:00:00:00")


def test_mac_is_kept_in_lower_case():
    assert Tap(mac="52:54:00:AB:CD:EF").mac == "52:54:00:ab:cd:ef"


def test_derived_macs():
    # printf web | sha256sum, and so on.
    assert mac_for("web", 0) == "52:54:00:4b:5e:57"
    assert len({mac_for("web", index) for index in range(50)}) == 50


@pytest.mark.parametrize("name", ["", "x" * 16, "a b", "a/b", "a:b", ".", "..", "-x", "größe", 5])
def test_tap_names_that_cannot_be(name):
    with pytest.raises(InvalidConfigError, match="cannot be an interface name: expected 1 to 15"):
        Tap(name)


def test_networks():
    network = Tap("a")
    assert VmConfig(networks=network).networks == (network,)
    assert VmConfig(networks=[]).networks == ()
    for pair in (SocketPairFd(3), [SocketPairFd(3)]):
        with pytest.raises(InvalidConfigError, match="VM 'vm': a socket-pair network works on macOS only, not on Linux: use a Tap"):
            VmConfig(networks=pair)
    for wrong in ("tap0", ["tap0"], 5, [None]):
        with pytest.raises(InvalidConfigError, match="networks"):
            VmConfig(networks=wrong)
    with pytest.raises(InvalidConfigError, match="uses a TAP twice"):
        VmConfig(networks=[Tap("a"), Tap("b"), Tap("a")])
    assert issubclass(Network, object)


@pytest.mark.parametrize("netns", ["", "a/b", "..", "a b", "a\n", 5, "x" * 300])
def test_namespaces_that_cannot_be(netns):
    with pytest.raises(InvalidConfigError, match="cannot be the name of a network namespace"):
        VmConfig(netns=netns)


def test_copies_are_validated_anew():
    config = VmConfig(name="a")
    assert config.replace(cpus=2).cpus == 2
    with pytest.raises(InvalidConfigError):
        config.replace(cpus=0)


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        VmConfig().cpus = 2


@pytest.mark.parametrize(
    ("given_name", "near"),
    [("memory", "memory_mb"), ("kernal", "kernel"), ("shared_dir", "shared_dirs"), ("timeout", "boot_timeout")],
)
def test_unknown_argument_lists_the_near_ones(given_name, near):
    with pytest.raises(InvalidConfigError, match=rf"no argument '{given_name}'; did you mean .*{near}"):
        check_argument_names({given_name: 1})


def test_unknown_argument_with_nothing_near_lists_all():
    with pytest.raises(InvalidConfigError, match=r"there are: name, namespace, kernel.*boot_timeout"):
        check_argument_names({"xyzzy": 1})


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
paths = st.binary(min_size=1, max_size=30).filter(lambda raw: b"\0" not in raw).map(lambda raw: Path("/") / os.fsdecode(raw))
identities = st.builds(ProcessIdentity, st.integers(1, 2**22), st.none() | st.integers(0, 2**40))
handles = st.builds(
    VmHandle,
    name=names,
    namespace=names,
    vmm=st.sampled_from(["qemu", "cloud-hypervisor"]),
    state=st.sampled_from(VmState),
    process=st.none() | identities,
    serial_log=paths,
    machine_id=st.uuids().map(str),
    run_dir=st.none() | paths,
    ready_marker=names,
    nonce=st.none() | names,
    taps=st.lists(names, max_size=3).map(tuple),
    netns=st.none() | names,
    sidecars=st.lists(identities, max_size=3).map(tuple),
    command=st.lists(st.text() | paths.map(os.fspath), max_size=4).map(tuple),
)


@given(handles)
def test_handle_survives_json(handle):
    text = handle.to_json()
    text.encode("ascii")
    assert VmHandle.from_json(text) == handle


@pytest.mark.parametrize("text", ["", "null", "[]", "5", "{}", '{"name": "a"}', '{"state": "dancing"}', "not json"])
def test_text_that_is_no_handle(text):
    with pytest.raises(InvalidConfigError, match=r"this is no VmHandle: .*; expected what VmHandle.to_json\(\) wrote"):
        VmHandle.from_json(text)


def test_vmm_log_is_beside_the_serial_log():
    def log_of(path):
        return VmHandle("a", "b", "qemu", VmState.STARTING, None, Path(path), "id").vmm_log

    assert log_of("/d/vm.serial.log") == Path("/d/vm.serial.vmm.log")
    assert log_of("/d/vm.log") == Path("/d/vm.vmm.log")
    assert log_of("/d/vm") == Path("/d/vm.vmm.log")


@given(st.binary(max_size=100))
def test_outputs_are_as_written(raw):
    done = CommandResult("true", 0, raw, b"", 0.1)
    assert done.stdout.encode(errors="surrogateescape") == raw

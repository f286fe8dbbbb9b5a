"""How a kernel was configured, and what a test needs of it."""

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_chvm import InvalidConfigError
from pytest_chvm.guest.kernels.config import KernelConfig, KernelNeeds, config_of, version_of
from pytest_chvm.guest.kernels.kernel import inspect_kernel

TEXT = """\
#
# Automatically generated file; DO NOT EDIT.
#
CONFIG_BPF_LSM=y
CONFIG_EXT4_FS=m
# CONFIG_KASAN is not set
CONFIG_HZ=250
CONFIG_LSM="landlock,\\"odd\\""
CONFIG_EMPTY=""
"""
VMLINUX = b"\x7fELF" + bytes(60) + b"Linux version 6.1.0-test (builder) "


def test_options_are_found_with_and_without_their_prefix():
    config = KernelConfig(TEXT)
    assert config["BPF_LSM"] == config["CONFIG_BPF_LSM"] == "y"
    assert {**config} == {
        "CONFIG_BPF_LSM": "y", "CONFIG_EXT4_FS": "m", "CONFIG_KASAN": "n", "CONFIG_HZ": "250", "CONFIG_LSM": 'landlock,"odd"', "CONFIG_EMPTY": "",
    }  # fmt: skip
    assert "NO_SUCH" not in config
    with pytest.raises(KeyError):
        config["NO_SUCH"]


@pytest.mark.parametrize(
    ("need", "why"),
    [
        ("BPF_LSM", None),
        ("CONFIG_EXT4_FS", None),
        ("EXT4_FS=m", None),
        ("EXT4_FS=y", "CONFIG_EXT4_FS=m (needed: y)"),
        ("KASAN=n", None),
        ("NO_SUCH=n", None),
        ("KASAN", "no CONFIG_KASAN"),
        ("NO_SUCH", "no CONFIG_NO_SUCH"),
        ("BPF_LSM=n", "CONFIG_BPF_LSM=y"),
        ("HZ=250", None),
        ("HZ=1000", "CONFIG_HZ=250 (needed: 1000)"),
        ('LSM="landlock,\\"odd\\""', None),
    ],
)
def test_an_option_is_as_it_is_needed_or_it_is_said_how_it_is(need, why):
    assert KernelNeeds.checked([need], None).why_not_config(KernelConfig(TEXT)) == (why and f"the kernel has {why}")


@pytest.mark.parametrize(
    ("release", "least", "is_enough"),
    [
        ("6.1.0-18-amd64", "6.1", True),
        ("6.1.0-18-amd64", "6.1.0", True),
        ("6.1.0", "6.1.1", False),
        ("6.10.3", "6.9", True),
        ("5.15.0-91-generic", "6", False),
        ("odd", "6", False),
    ],
)
def test_versions_are_compared_by_their_numbers(release, least, is_enough):
    assert (KernelNeeds.checked(None, least).why_not_version(release) is None) == is_enough


@pytest.mark.parametrize(
    ("options", "least"),
    [(["KASAN N"], None), ([3], None), (5, None), ([], None), (["A="], None), (None, "new"), (None, 6.1), ("", None)],
)
def test_what_no_kernel_could_have_is_refused(options, least):
    with pytest.raises(InvalidConfigError, match=r"kernel_(config|min)="):
        KernelNeeds.checked(options, least)


@pytest.fixture
def kernel(tmp_path):
    """A kernel without a configuration, that a test puts one beside."""

    def inspect(data=VMLINUX, place="boot/vmlinuz-6.1.0-test"):
        image = tmp_path / place
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(data)
        return inspect_kernel(image)

    return inspect


def test_a_kernel_that_nothing_is_known_of_has_no_configuration(kernel):
    assert config_of(kernel()) is None


def test_the_configuration_in_the_kernel_itself_comes_before_what_lies_beside_it(kernel, tmp_path):
    packed = gzip.compress(b"CONFIG_OWN=y\n")
    inside = kernel(VMLINUX + b"IKCFG_ST" + packed + b"IKCFG_ED")
    (tmp_path / "boot" / "config-6.1.0-test").write_text(TEXT)
    assert {**config_of(inside)} == {"CONFIG_OWN": "y"}


@pytest.mark.parametrize(
    ("place", "beside"),
    [
        ("boot/vmlinuz-6.1.0-test", "boot/config-6.1.0-test"),
        ("linux/vmlinux", "linux/.config"),
        ("linux/arch/x86/boot/bzImage", "linux/.config"),
        ("boot/vmlinuz-6.1.0-test", "lib/modules/6.1.0-test/config"),
    ],
)
def test_the_configuration_of_a_package_or_a_tree_is_found_by_the_image(kernel, tmp_path, place, beside):
    (tmp_path / "lib/modules/6.1.0-test/kernel").mkdir(parents=True)
    (tmp_path / beside).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / beside).write_text(TEXT)
    (tmp_path / "linux").mkdir(exist_ok=True)
    (tmp_path / "linux" / "Kconfig").touch()
    assert config_of(kernel(place=place))["HZ"] == "250"


@pytest.mark.parametrize(
    "data",
    [b"IKCFG_ST", b"IKCFG_EDIKCFG_ST", b"IKCFG_STno gzipIKCFG_ED", b"IKCFG_ST" + gzip.compress(TEXT.encode())[:20] + b"IKCFG_ED"],
)
def test_a_kernel_that_is_cut_off_in_its_configuration_does_no_harm(kernel, data):
    assert not config_of(kernel(VMLINUX + data))


@given(st.text())
def test_no_text_breaks_the_parsers(text):
    config = KernelConfig(text)
    assert all(name.startswith("CONFIG_") for name in config)
    assert all(number >= 0 for number in version_of(text))

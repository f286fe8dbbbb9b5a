"""Options: which source counts, and what a value that cannot be is answered with."""

import os
from pathlib import Path

import pytest

from pytest_chvm import InvalidConfigError, Settings
from pytest_chvm.settings import OPTIONS

PROMISED = {
    "kernel", "initramfs", "root_disk", "cmdline", "cpus", "memory_mb", "boot_timeout", "ready_marker", "vmm", "accel", "network", "boot",
    "missing", "keep", "artifacts", "max_vms", "memory_budget_mb", "binary", "virtiofsd",
}  # fmt: skip


def resolve(command_line=None, environment=None, ini=None):
    return Settings.resolve(command_line or {}, environment or {}, ini or {})


def test_all_promised_options_are_there_under_their_three_names():
    by_name = {option.name: option for option in OPTIONS}
    assert by_name.keys() >= PROMISED
    assert (by_name["memory_mb"].flag, by_name["memory_mb"].variable, by_name["memory_mb"].ini_key) == (
        "--chvm-memory-mb",
        "CHVM_MEMORY_MB",
        "chvm_memory_mb",
    )


def test_defaults():
    settings = resolve()
    assert (settings.cpus, settings.memory_mb, settings.boot_timeout, settings.ready_marker) == (1, 256, 60.0, "CHVM_READY")
    assert (settings.vmm, settings.accel, settings.network, settings.boot, settings.missing, settings.keep) == (
        "auto", "auto", "auto", "auto", "fail", "never",
    )  # fmt: skip
    assert (settings.kernel, settings.initramfs, settings.cmdline) == ((), None, None)


def test_command_line_then_environment_then_ini_then_default():
    line, environment, ini = {"cpus": "2"}, {"CHVM_CPUS": "3"}, {"chvm_cpus": "4"}
    assert resolve(line, environment, ini).cpus == 2
    assert resolve({}, environment, ini).cpus == 3
    assert resolve({"cpus": None}, environment, ini).cpus == 3
    assert resolve({}, {}, ini).cpus == 4
    assert resolve().cpus == 1


def test_argument_comes_before_all():
    settings = resolve({"vmm": "qemu", "boot_timeout": "5"})
    changed = settings.with_arguments({"vmm": "cloud-hypervisor", "boot_timeout": None, "wait": False})
    assert (changed.vmm, changed.boot_timeout) == ("cloud-hypervisor", 5.0)


def test_empty_variable_or_key_is_one_that_is_not_set():
    assert resolve({}, {"CHVM_CPUS": "", "CHVM_KERNEL": "", "CHVM_CMDLINE": ""}, {"chvm_cpus": "", "chvm_kernel": []}) == resolve()


def test_falsy_value_of_the_command_line_counts():
    assert resolve({"cmdline": ""}, {"CHVM_CMDLINE": "quiet"}).cmdline == ""


def test_environment_is_the_processs_own_where_none_is_given(monkeypatch):
    monkeypatch.setenv("CHVM_CPUS", "7")
    assert Settings.resolve().cpus == 7


def test_several_kernels():
    expected = (Path("/a"), Path("/b c"))
    assert resolve({"kernel": ["/a", "/b c"]}).kernel == expected
    assert resolve({}, {"CHVM_KERNEL": f"/a{os.pathsep}/b c"}).kernel == expected
    assert resolve({}, {}, {"chvm_kernel": ["/a", "/b c"]}).kernel == expected
    assert resolve({}, {"CHVM_KERNEL": f"{os.pathsep}/a{os.pathsep}"}).kernel == expected[:1]


def test_paths_are_absolute_and_home_is_known(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve({"initramfs": "x/initrd"}).initramfs == tmp_path / "x/initrd"
    assert resolve({"initramfs": "~/initrd"}).initramfs == Path("/home/me/initrd")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cpus", "0", "expected a whole number of 1 or more"),
        ("cpus", "-1", "expected a whole number of 1 or more"),
        ("cpus", "two", "expected a whole number of 1 or more"),
        ("cpus", "1.5", "expected a whole number of 1 or more"),
        ("cpus", "٣", "expected a whole number of 1 or more"),
        ("memory_mb", "0", "expected a whole number of 1 or more"),
        ("memory_mb", "1G", "expected a whole number of 1 or more"),
        ("max_vms", "0", "expected a whole number of 1 or more"),
        ("boot_timeout", "0", "expected a number of seconds above 0"),
        ("boot_timeout", "-5", "expected a number of seconds above 0"),
        ("boot_timeout", "nan", "expected a number of seconds above 0"),
        ("boot_timeout", "inf", "expected a number of seconds above 0"),
        ("boot_timeout", "soon", "expected a number of seconds above 0"),
        ("ready_marker", "TWO WORDS", "expected one word"),
        ("ready_marker", "größe", "expected one word"),
        ("ready_marker", "a\n", "expected one word"),
        ("ready_marker", "x" * 65, "expected one word of at most 64"),
        ("vmm", "xen", "expected one of auto, cloud-hypervisor, qemu"),
        ("accel", "hvf", "expected one of auto, kvm, tcg"),
        ("network", "bridge", "expected one of auto, tap, user, none"),
        ("boot", "warm", "expected one of auto, cold, clone"),
        ("missing", "ignore", "expected one of fail, skip"),
        ("keep", "sometimes", "expected one of never, failed, always"),
    ],
)
def test_value_that_cannot_be_names_its_source(name, value, message):
    option = next(option for option in OPTIONS if option.name == name)
    for source, arguments in (
        (option.flag, ({name: value}, {}, {})),
        (option.variable, ({}, {option.variable: value}, {})),
        (option.ini_key, ({}, {}, {option.ini_key: value})),
    ):
        with pytest.raises(InvalidConfigError) as caught:
            resolve(*arguments)
        assert str(caught.value) == f"{source}={value!r}: {caught.value.__cause__}"
        assert message in str(caught.value)


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        resolve().cpus = 2

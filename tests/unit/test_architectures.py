"""The architecture that a VM asks for: what is refused before anything is started, and how packages of another one are had."""

import platform
import stat

import pytest

from pytest_chvm import HostRoot, InvalidConfigError, MissingRequirementError, Settings, UnsupportedError, VmConfig, launch
from pytest_chvm.drivers import choose_vmm, make_driver
from pytest_chvm.drivers.qemu.machines import MACHINES
from pytest_chvm.guest import elf
from pytest_chvm.guest.choice import built_in_cmdline
from pytest_chvm.guest.initramfs import find_busybox
from pytest_chvm.guest.kernels.default import default_kernel
from pytest_chvm.guest.kinds.built_in import BuiltInGuest
from pytest_chvm.guest.packages import PackageError, fetch_package
from pytest_chvm.model import ARCHITECTURES, architecture

OTHERS = [name for name in ARCHITECTURES if name != platform.machine()]


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("arm64", "arch='arm64', expected 'aarch64'"),
        ("amd64", "expected 'x86_64'"),
        ("vax", "one of x86_64, aarch64, riscv64"),
        (64, "arch=64"),
    ],
)
def test_an_unknown_architecture_is_refused(arch, said):
    with pytest.raises(InvalidConfigError, match=said):
        VmConfig(arch=arch)


@pytest.mark.parametrize("root", ["host", HostRoot()])
@pytest.mark.parametrize("arch", OTHERS)
def test_the_host_s_files_are_of_its_own_architecture(arch, root):
    with pytest.raises(InvalidConfigError, match=f"arch={arch!r} and root='host', whose programs are for {platform.machine()}"):
        VmConfig(arch=arch, root=root)
    assert VmConfig(arch=platform.machine(), root=root).architecture.is_host


def test_a_vmm_of_this_machine_s_architecture_only_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=f"arch={OTHERS[0]!r}: cloud-hypervisor runs guests of this machine's"):
        make_driver("cloud-hypervisor", arch=OTHERS[0])
    with pytest.raises(InvalidConfigError, match="accel='kvm' runs guests of this machine's architecture only"):
        make_driver("qemu", accel="kvm", arch=OTHERS[0])
    assert choose_vmm(arch=OTHERS[0])[0] == "qemu"
    assert make_driver("cloud-hypervisor", arch=platform.machine()).vmm == "cloud-hypervisor"


@pytest.mark.parametrize("arch", OTHERS)
def test_a_missing_qemu_is_named_with_its_package(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("pytest_chvm.drivers.qemu.driver.PLACES", (str(tmp_path),))
    with pytest.raises(MissingRequirementError, match=f"qemu-system-{arch} was not found: .* {MACHINES[arch].packages.split()[0]}"):
        launch(arch=arch, settings=Settings())


def test_each_architecture_has_its_machine_console_and_command_line():
    assert set(MACHINES) == set(ARCHITECTURES)
    assert {name: architecture(name).console_word for name in ARCHITECTURES} == {
        "x86_64": "console=ttyS0", "aarch64": "console=ttyAMA0", "riscv64": "console=ttyS0",
    }  # fmt: skip
    assert "no_timer_check" in built_in_cmdline(architecture("x86_64"))
    assert "no_timer_check" not in built_in_cmdline(architecture("aarch64"))


def test_where_nothing_renews_a_clone_it_is_booted_with_the_reason():
    config = VmConfig(arch="riscv64")
    assert "riscv64" not in elf.WRITTEN_FOR
    why = BuiltInGuest(config, "nonce").why_no_clone("none")
    assert why
    assert why.endswith("is written for x86_64 and aarch64, and not for riscv64")
    assert BuiltInGuest(VmConfig(arch="aarch64"), "nonce").why_no_clone("none") is None


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """An apt whose sources have what the test puts into a directory, by architecture: its package lists, and packages."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    offered = tmp_path / "offered"
    offered.mkdir()
    script = f"""#!/bin/sh
    for word; do
        case $word in
        APT::Architecture=*) arch=${{word#*=}} ;;
        Dir::State::Lists=*) lists=${{word#*=}} ;;
        update) what=update ;;
        esac
    done
    echo "$*" >>{tmp_path}/asked
    [ "$what" ] && {{ [ -e {offered}/$arch ] && cp {offered}/$arch $lists/a_binary-${{arch}}_Packages; echo 'W: nothing there' >&2; }}
    [ "$what" ] || {{ echo 'E: no such package' >&2; exit 100; }}
    """
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/apt-get"
    program.write_text(script)
    program.chmod(stat.S_IRWXU)
    return offered


def test_sources_without_an_architecture_are_told_with_what_to_name_instead(apt, tmp_path):
    riscv = architecture("riscv64")
    with pytest.raises(MissingRequirementError, match=r"no kernel of riscv64 .* have none for riscv64: W: nothing .* kernel="):
        default_kernel(tmp_path / "cache", riscv, print)
    with pytest.raises(MissingRequirementError, match=r"no statically linked BusyBox of riscv64 .* busybox-riscv64 on PATH"):
        find_busybox(tmp_path / "cache", print, riscv)


def test_package_lists_of_another_architecture_are_our_own_and_fetched_once(apt, tmp_path):
    (apt / "arm64").write_text("")
    for _each in range(2):
        with pytest.raises(PackageError, match="no such package"):
            fetch_package("busybox-static", tmp_path / "cache", print, architecture("aarch64"))
    asked = [line for line in (tmp_path / "asked").read_text().splitlines() if line.startswith("update ")]
    assert len(asked) == 1
    # Nothing of the host's is written.
    assert f"Dir::State::Lists={tmp_path}/cache/apt" in asked[0]
    assert f"Dir::Cache={tmp_path}/cache/apt" in asked[0]


def test_a_busybox_of_one_s_own_is_one_on_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    program = tmp_path / "busybox-riscv64"
    program.write_bytes(b"\x7fELF" + bytes(100))
    program.chmod(0o755)
    assert find_busybox(tmp_path / "cache", print, architecture("riscv64")) == program

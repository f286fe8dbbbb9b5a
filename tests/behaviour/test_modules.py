"""Modules of a guest's kernel: each of them by modprobe, those of the VM's before it is ready, and a module of one's own."""

import pytest

from pytest_chvm import GuestCommandError, InvalidConfigError, Settings
from pytest_chvm.guest.kernels.modules import module_files
from pytest_chvm.machine.guest_choice import built_in_kernel


@pytest.fixture(scope="module")
def files():
    """The files of the default kernel's modules, by name."""
    return module_files(built_in_kernel(Settings.resolve()).modules_dir)


def loaded(vm):
    return {line.split()[0] for line in vm.read_text("/proc/modules").splitlines()}


@pytest.mark.parametrize("how", ["cold", "clone"])
def test_each_module_of_its_kernel_is_loaded_by_modprobe(boot, how):
    vm = boot(boot=how, network="none")
    assert not {"nf_tables", "dm_flakey"} & loaded(vm)
    vm.check_output("modprobe nf_tables && modprobe dm-flakey && modprobe dummy numdummies=3")
    assert {"nf_tables", "nfnetlink", "dm_flakey", "dm_mod"} <= loaded(vm)
    assert vm.check_output("ls -d /sys/class/net/dummy*").count("dummy") == 3
    # By an alias, and by the kernel itself, which calls modprobe for what it lacks.
    vm.check_output("modprobe fs-vfat && modprobe loop && dd if=/dev/zero of=/tmp/image bs=1M count=4 2>&1")
    assert "vfat" in loaded(vm)
    assert "isofs" not in loaded(vm)
    vm.run("mount -t iso9660 -o loop /tmp/image /mnt")
    assert "isofs" in loaded(vm)
    missing = vm.run("modprobe no_such_module")
    assert (missing.returncode, "not found" in missing.stderr) == (1, True)


def test_modules_are_loaded_when_it_is_ready_with_their_parameters_in_clones_too(boot):
    for how in ("cold", "clone"):
        vm = boot(modules=["dm-flakey", "loop max_loop=3", "ext4"], boot=how, network="none")
        assert {"dm_flakey", "dm_mod", "loop"} <= loaded(vm)
        assert vm.read_text("/sys/module/loop/parameters/max_loop") == "3\n"


def test_a_disk_that_is_plugged_in_has_the_name_that_it_has_without_modules(boot, tmp_path):
    image = tmp_path / "data.img"
    image.write_bytes(b"mark" + bytes((1 << 20) - 4))
    vm = boot(hotplug=True, network="none", data_disk=image)
    assert vm.check_output("head -c 4 /dev/vda") == "mark"
    second = tmp_path / "second.img"
    second.write_bytes(b"next" + bytes((1 << 20) - 4))
    vm.add_disk(second)
    assert vm.check_output("head -c 4 /dev/vdb; modprobe dummy") == "next"


def test_a_module_of_ones_own_is_loaded_after_those_it_needs(boot, files, tmp_path):
    vm = boot(network="none")
    own = tmp_path / "own.ko"
    own.write_bytes(files["dm_flakey"].read_bytes())
    assert vm.load_module(own) == "dm_flakey"
    assert {"dm_flakey", "dm_mod"} <= loaded(vm)
    assert vm.load_module(files["dummy"], numdummies=2) == "dummy"
    assert vm.check_output("ls -d /sys/class/net/dummy*").count("dummy") == 2
    with pytest.raises(GuestCommandError, match="File exists"):
        vm.load_module(files["dummy"])
    assert vm.check_output("ls /tmp") == ""


def test_a_file_that_the_kernel_would_not_load_is_refused_with_the_reason(boot, files, tmp_path):
    vm = boot(network="none")
    other = tmp_path / "other.ko"
    other.write_bytes(files["dummy"].read_bytes().replace(b"\0vermagic=6", b"\0vermagic=5"))
    with pytest.raises(InvalidConfigError, match=r"was built for kernel 5.*, and this VM's is 6.*kernel= of the tree"):
        vm.load_module(other)
    (tmp_path / "text.ko").write_text("no module")
    with pytest.raises(InvalidConfigError, match="is no kernel module: expected an ELF file"):
        vm.load_module(tmp_path / "text.ko")
    with pytest.raises(InvalidConfigError, match="cannot be read"):
        vm.load_module(tmp_path / "missing.ko")
    broken = tmp_path / "broken.ko"
    broken.write_bytes(files["dummy"].read_bytes()[:-2000])
    with pytest.raises(GuestCommandError, match=r"did not take the module .*broken\.ko"):
        vm.load_module(broken)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["btrfss"], "has no module 'btrfss'.*did you mean btrfs"),
        (["ext4 a=b"], "'ext4' is built into kernel .*cmdline_extra='ext4.a=b'"),
        ("btrfs", r"expected a list like \['btrfs'"),
        (["dummy numdummies=2 $(reboot)"], "expected a module's name, and behind it its parameters"),
    ],
)
def test_modules_that_cannot_be_loaded_are_refused_before_anything_is_started(boot, modules, message):
    with pytest.raises(InvalidConfigError, match=message):
        boot(modules=modules)

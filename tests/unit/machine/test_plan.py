"""What is decided of a VM before it is started."""

from dataclasses import replace

import pytest

from pytest_chvm import InvalidConfigError, Settings, UnsupportedError, VmConfig
from pytest_chvm.host.host import default_host
from pytest_chvm.machine.plan import FIRST_OF_IMAGE, make_plan, template_store


@pytest.fixture
def plan(fake_kernel, tmp_path):
    """Plan a VM of an image, with QEMU."""
    initramfs = tmp_path / "initramfs"
    initramfs.touch()
    image = VmConfig(name="planned", kernel=fake_kernel, initramfs=initramfs, cmdline="quiet")
    defaults = replace(Settings.resolve({}, {}, {}), vmm="qemu", network="none", cache_dir=tmp_path / "cache")

    def make(settings=None, *, wait=True, **config):
        return make_plan(image.replace(**config), replace(defaults, **(settings or {})), default_host(), wait=wait)

    return make


def test_an_image_is_booted_and_cloned_once_its_template_was_wanted(plan):
    first = plan()
    assert first.why_cold == plan().why_cold == FIRST_OF_IMAGE
    template_store(first.settings, default_host()).want(first.image_parts)
    assert plan().why_cold is None


@pytest.mark.parametrize(
    ("settings", "more", "why"),
    [
        ({"boot": "cold"}, {}, "asked for"),
        ({}, {"wait": False}, "whose boot is not waited for"),
        ({}, {"channels": ["one"]}, "it has channels"),
        ({"boot": "auto"}, {"clone_must_have": ["cmdline"]}, "clone_must_have has 'cmdline'"),
        ({}, {"clone_must_have": ["uptime", "boot_id"]}, "its image may have read its template's already"),
        ({}, {"clone_must_have": ["kaslr"]}, "a clone's kernel is at its template's addresses"),
        ({"network": "user"}, {}, "whose addresses are not given by a TAP of ours"),
    ],
)
def test_the_plan_says_why_a_vm_is_booted(plan, settings, more, why):
    assert why in plan(settings, **more).why_cold


def test_a_vm_that_must_be_a_clone_and_cannot_be_is_refused(plan):
    with pytest.raises(UnsupportedError, match="'planned' cannot be a clone: it has channels; use boot='auto' or 'cold'"):
        plan({"boot": "clone"}, channels=["one"])
    assert plan({"boot": "clone"}).why_cold is None


def test_networks_that_it_cannot_be_on_are_refused_before_anything_is_taken_from_the_host(plan):
    with pytest.raises(UnsupportedError, match="outbound=False goes with"):
        plan({"network": "tap"}, outbound=False)


@pytest.mark.parametrize(
    ("given", "cmdline"),
    [
        ({"cmdline": "quiet", "cmdline_extra": "slub_debug=FZP"}, "quiet slub_debug=FZP"),
        ({"cmdline": None, "cmdline_extra": "slub_debug=FZP"}, "console=ttyS0 slub_debug=FZP"),
        ({"cmdline": "", "cmdline_extra": "slub_debug=FZP"}, "slub_debug=FZP"),
        ({"cmdline": "quiet", "cmdline_extra": ""}, "quiet"),
        ({"cmdline": "quiet"}, "quiet"),
    ],
)
def test_what_is_extra_is_added_to_the_command_line_that_there_would_be(plan, given, cmdline):
    assert plan(**given).guest.config.cmdline == cmdline


def test_the_hosts_root_goes_with_no_initramfs_but_the_built_in_one(plan, fake_kernel, monkeypatch, tmp_path):
    with pytest.raises(InvalidConfigError, match="'planned': root='host' and an initramfs"):
        plan(root="host")

    monkeypatch.setattr("pytest_chvm.guest.choice._built_in_initramfs", lambda *_: tmp_path / "initramfs")
    config = plan(root="host", initramfs=None).guest.config

    assert config.initramfs == tmp_path / "initramfs"
    assert config.shared_dirs[0].host_path == type(tmp_path)("/")

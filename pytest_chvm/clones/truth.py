"""In what a clone is not as a VM that was booted, by the words of `clone_must_have`; docs/how-it-works.md has the whole list."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pytest_chvm.clones.templates import clone_config
from pytest_chvm.guest.kinds import Guest
from pytest_chvm.model.clone_facts import CloneFact


def why_booted(guest: Guest) -> str | None:
    """Return why a VM is booted for what its test looks at; None where a clone has all of that as a booted VM has."""
    for word in guest.config.clone_must_have:
        if word in _UNTRUE and (why := _UNTRUE[word](guest)) is not None:
            return f"clone_must_have has {word!r}: {why}"
    return None


def _always(why: str) -> Callable[[Guest], str]:
    return lambda _guest: why


def _boot_id(guest: Guest) -> str | None:
    # In the built-in guest nobody has read it before the random pool is reseeded, and the kernel makes it when it is first read.
    return None if guest.keeps_boot_id_unread else "its image may have read its template's already"


def _devices(guest: Guest) -> str | None:
    if clone_config(guest.config).hotplug == guest.config.hotplug:
        return None
    return "its disks and shared dirs are plugged into a clone, behind ports that a booted VM does not have"


def _kaslr(guest: Guest) -> str | None:
    if "nokaslr" in (guest.config.cmdline or "").split():
        return None
    return "a clone's kernel is at its template's addresses"


def _mac(guest: Guest) -> str | None:
    return None if guest.config.networks == () else "the permanent address of a clone's NIC is its template's"


_UNTRUE: Mapping[CloneFact, Callable[[Guest], str | None]] = {
    "boot_id": _boot_id,
    "cmdline": _always("the words for this plugin (chvm.*) on a clone's are its template's"),
    "devices": _devices,
    "dmesg": _always("what a clone's kernel said while it booted, it said in its template"),
    "dmi_uuid": _always("a clone's is its template's"),
    "interrupts": _devices,
    "kaslr": _kaslr,
    "mac": _mac,
    "secrets": _always("what a clone's kernel has drawn of random numbers while it booted is its template's"),
}

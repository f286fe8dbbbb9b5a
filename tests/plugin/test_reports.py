"""What a person sees: the header, and the consoles of a failed test's VMs."""

from __future__ import annotations

import re

import pytest

from pytest_chvm.machine.events import read_events
from tests.runs import RunPytest

# As in a terminal's output: nothing but line ends and tabs.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _section(result: pytest.RunResult, title: str) -> list[str]:
    """Return the lines of a report's section."""
    (start,) = (number for number, line in enumerate(result.outlines) if re.fullmatch(rf"-+ {title}(, .*)? -+", line))
    lines = []
    for line in result.outlines[start + 1 :]:
        if re.match(r"(---|===|___)", line):
            break
        lines.append(line)
    return lines


def test_a_failed_test_s_report_has_the_console_cleaned_and_bounded_and_keeps_the_log(
    pytester: pytest.Pytester, run_pytest: RunPytest
) -> None:
    pytester.makepyfile(
        """
        def test_fails(chvm_vm):
            vm = chvm_vm(name="loud")
            vm.check_output("dd if=/dev/zero bs=1024 count=1024 2>/dev/null | tr '\\\\0' 'x' >/dev/console")
            vm.check_output("cat >/dev/console", input=(
                "\\n\\033[31mred\\033[0m \\033]0;title\\007 bell\\007 back\\b \\000 \\302\\233\\nlast words\\n"
            ))
            vm.wait_for_console("last words")
            raise AssertionError("on purpose")
        """
    )
    result = run_pytest("--chvm-keep=failed", "--chvm-artifacts=logs")
    result.assert_outcomes(failed=1)
    section = _section(result, "console of VM loud")
    assert section[-1] == "last words"
    assert section[-2].startswith("red ")
    assert "title" not in section[-2]
    assert not CONTROL_CHARACTERS.search("\n".join(section))
    assert sum(map(len, section)) < 20_000
    assert not CONTROL_CHARACTERS.search(result.stdout.str().replace("\n", ""))
    assert re.search(r"console of VM loud, .*, ready after \d+\.\d s", result.stdout.str())
    history = _section(result, "events of VM loud")
    assert re.fullmatch(r" +0\.0 s  spawned: qemu, pid \d+", history[0])
    assert any(re.fullmatch(r" +\d+\.\d s  command: returned 0 after \d+\.\d+ s: cat >/dev/console", line) for line in history)
    # The kept log is the guest's own, whole.
    (log,) = pytester.path.glob("logs/*/loud.serial.log")
    assert log.stat().st_size > 1 << 20
    assert any(event.kind == "ready" for event in read_events(log.with_suffix(".events.jsonl")))


def test_a_failure_in_set_up_and_one_in_an_xdist_worker_have_the_console_too(
    pytester: pytest.Pytester, run_pytest: RunPytest
) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture
        def machine(chvm_vm):
            return chvm_vm(name="panics", cmdline="console=ttyS0 rdinit=/nonexistent root=/dev/nothing", networks=[])

        def test_in_set_up(machine):
            pass

        def test_in_call(chvm_vm):
            vm = chvm_vm(name="works", networks=[])
            vm.run("echo seen by the worker >/dev/console")
            vm.wait_for_console("seen by the worker")
            raise AssertionError("on purpose")
        """
    )
    result = run_pytest("-n", "1")
    result.assert_outcomes(failed=1, errors=1)
    result.stdout.fnmatch_lines(["E *GuestPanicError: VM 'panics': the guest's kernel gave up: Kernel panic - not syncing: *"])
    assert any("Kernel panic - not syncing" in line for line in _section(result, "console of VM panics"))
    assert "seen by the worker" in _section(result, "console of VM works")


def test_a_boot_gives_up_before_pytest_timeout_does_and_says_what_the_console_said(
    pytester: pytest.Pytester, run_pytest: RunPytest, user_environment: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(
        """
        import pytest
        from pytest_chvm.machine.guest_choice import choose_guest
        from pytest_chvm.model import VmConfig
        from pytest_chvm.settings import Settings

        @pytest.fixture
        def silent():
            # A guest of the user's, for all we know: it never prints the marker that is waited for.
            initramfs = choose_guest(VmConfig(), Settings.resolve()).config.initramfs
            return {"initramfs": initramfs, "ready_marker": "NEVER_PRINTED", "networks": []}

        def test_limit_of_the_run(chvm_vm, silent):
            chvm_vm(**silent)

        @pytest.mark.timeout(4)
        def test_limit_of_the_marker(chvm_vm, silent):
            chvm_vm(**silent)

        def test_limit_of_the_run_for_a_session_s_vm(chvm_vm_factory, silent):
            chvm_vm_factory(**silent)

        def test_argument_above_the_limit(chvm_vm, silent):
            chvm_vm(boot_timeout=50, **silent)
        """
    )
    user_environment.setenv("PYTEST_TIMEOUT", "6")
    result = run_pytest("--chvm-boot-timeout=40")
    result.assert_outcomes(failed=4)
    limits = re.findall(r"E +pytest_chvm.errors.BootFailedError: VM '[^']*' was not ready within ([\d.]+) s", result.stdout.str())
    assert len(limits) == 4, result.stdout.str()
    assert [float(limit) for limit in limits] == pytest.approx([4.8, 3.2, 4.8, 4.8], abs=0.4)


def test_the_header_says_which_vmm_and_network_and_why(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    pytester.makepyfile("def test_vm(chvm_vm): pass")
    asked = run_pytest("--collect-only", "--chvm-vmm=qemu", "--chvm-network=user")
    asked.stdout.fnmatch_lines(["chvm: VMM qemu*asked for*", "chvm: network user*asked for*"])
    found = run_pytest("--collect-only")
    found.stdout.re_match_lines([r"chvm: VMM (qemu|cloud-hypervisor)\W+\w.*", r"chvm: network (tap|user|none)\W+\w.*"])

"""The options: where a value is from, what a bad one says, and what those do that are about runs rather than VMs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pytest_chvm.guest.kernels.kernel import inspect_kernel
from pytest_chvm.settings import OPTIONS
from tests.leaks import Sandbox
from tests.runs import RunPytest

PRINTS_SETTINGS = """
    import dataclasses, json, pathlib

    def test_settings(chvm_settings, pytestconfig):
        text = json.dumps(dataclasses.asdict(chvm_settings), default=str)
        pathlib.Path(pytestconfig.rootpath, "settings.json").write_text(text)
"""
# Of each option: its default, then a value for the ini file, the environment and the command line.
VALUES = {
    "kernel": ([], "/ini/kernel", "/env/kernel", "/line/kernel"),
    "initramfs": (None, "/ini/initramfs", "/env/initramfs", "/line/initramfs"),
    "root_disk": (None, "/ini/disk", "/env/disk", "/line/disk"),
    "cmdline": (None, "ini", "env", "line"),
    "cpus": (1, "2", "3", "4"),
    "memory_mb": (256, "102", "103", "104"),
    "boot_timeout": (60.0, "2.5", "3.5", "4.5"),
    "ready_marker": ("CHVM_READY", "INI_READY", "ENV_READY", "VMRS_READY"),
    "vmm": ("auto", "qemu", "cloud-hypervisor", "auto"),
    "accel": ("auto", "kvm", "tcg", "auto"),
    "network": ("auto", "user", "none", "tap"),
    "boot": ("auto", "cold", "clone", "auto"),
    "missing": ("fail", "skip", "fail", "skip"),
    "kernel_splat": ("warn", "ignore", "fail", "warn"),
    "keep": ("never", "failed", "always", "never"),
    "core": ("never", "failed", "never", "failed"),
    "artifacts": (None, "/ini/artifacts", "/env/artifacts", "/line/artifacts"),
    "max_vms": (None, "5", "6", "7"),
    "memory_budget_mb": (None, "1025", "1026", "1027"),
    "binary": (None, "/ini/binary", "/env/binary", "/line/binary"),
    "virtiofsd": (None, "/ini/virtiofsd", "/env/virtiofsd", "/line/virtiofsd"),
    "subnet_pool": ("198.18.0.0/15", "10.1.0.0/16", "10.2.0.0/16", "10.3.0.0/16"),
    "cache_dir": (None, "/ini/cache", "/env/cache", "/line/cache"),
}


def _read_settings(pytester: pytest.Pytester) -> dict[str, object]:
    settings: dict[str, object] = json.loads(pytester.path.joinpath("settings.json").read_text())
    return settings


def _typed(name: str, text: str) -> object:
    """Return a value of the table as it is in the settings."""
    if name == "kernel":
        return [text]
    if name == "boot_timeout":
        return float(text)
    return int(text) if text.isdigit() else text


def test_the_table_of_values_has_every_option_with_an_own_value_for_each_place() -> None:
    assert set(VALUES) == {option.name for option in OPTIONS}
    assert all(default != ini and ini != env and env != line for default, ini, env, line in VALUES.values())


def test_the_command_line_comes_before_the_environment_before_ini_before_the_default(
    pytester: pytest.Pytester, run_pytest: RunPytest, user_environment: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(PRINTS_SETTINGS)
    user_environment.delenv("CHVM_CACHE_DIR")
    run_pytest().assert_outcomes(passed=1)
    assert _read_settings(pytester) == {name: default for name, (default, *_) in VALUES.items()}

    lines = [f"chvm_{name} = {ini}" for name, (_, ini, _, _) in VALUES.items()]
    pytester.makeini("\n".join(["[pytest]", *lines]))
    run_pytest("--strict-config").assert_outcomes(passed=1)
    assert _read_settings(pytester) == {name: _typed(name, ini) for name, (_, ini, _, _) in VALUES.items()}

    for name, (_, _, env, _) in VALUES.items():
        user_environment.setenv(f"CHVM_{name.upper()}", env)
    run_pytest().assert_outcomes(passed=1)
    assert _read_settings(pytester) == {name: _typed(name, env) for name, (_, _, env, _) in VALUES.items()}

    flags = [f"--chvm-{name.replace('_', '-')}={line}" for name, (_, _, _, line) in VALUES.items()]
    run_pytest(*flags).assert_outcomes(passed=1)
    assert _read_settings(pytester) == {name: _typed(name, line) for name, (_, _, _, line) in VALUES.items()}


def test_a_falsy_value_is_a_value_and_several_kernels_are_separated_as_in_path(
    pytester: pytest.Pytester, run_pytest: RunPytest, user_environment: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(PRINTS_SETTINGS)
    pytester.makeini("[pytest]\nchvm_cmdline = of the file\nchvm_artifacts = relative/to/the/file")
    user_environment.setenv("CHVM_KERNEL", "/first:/second")
    user_environment.setenv("CHVM_CMDLINE", "of the environment")
    run_pytest("--chvm-cmdline=").assert_outcomes(passed=1)
    settings = _read_settings(pytester)
    assert settings["cmdline"] == ""
    assert settings["kernel"] == ["/first", "/second"]
    assert settings["artifacts"] == str(pytester.path / "relative/to/the/file")


@pytest.mark.parametrize(
    ("arguments", "environment", "ini", "message"),
    [
        (["--chvm-cpus=zero"], {}, "", "ERROR: --chvm-cpus='zero': expected a whole number of 1 or more"),
        (["--chvm-boot-timeout=0"], {}, "", "ERROR: --chvm-boot-timeout='0': expected a number of seconds above 0"),
        (["--chvm-vmm=vmware"], {}, "", "*error: argument --chvm-vmm: invalid choice: 'vmware' (choose from *qemu*"),
        ([], {"CHVM_MEMORY_MB": "-1"}, "", "ERROR: CHVM_MEMORY_MB='-1': expected a whole number of 1 or more"),
        ([], {"CHVM_NETWORK": "wifi"}, "", "ERROR: CHVM_NETWORK='wifi': expected one of auto, tap, user, none"),
        ([], {}, "chvm_keep = sometimes", "ERROR: chvm_keep='sometimes': expected one of never, failed, always"),
        (["-n", "1"], {}, "chvm_ready_marker = two words", "ERROR: chvm_ready_marker='two words': expected one word *"),
        (["--chvm-no-such-option"], {}, "", "*error: unrecognized arguments: --chvm-no-such-option"),
    ],
)
def test_a_bad_option_value_is_a_usage_error_that_names_its_source(
    pytester: pytest.Pytester,
    run_pytest: RunPytest,
    user_environment: pytest.MonkeyPatch,
    arguments: list[str],
    environment: dict[str, str],
    ini: str,
    message: str,
) -> None:
    pytester.makepyfile("def test_plain(): pass")
    pytester.makeini(f"[pytest]\n{ini}")
    for name, value in environment.items():
        user_environment.setenv(name, value)
    result = run_pytest(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])
    assert "Traceback" not in result.stderr.str() + result.stdout.str()


def test_each_vm_test_runs_once_per_kernel_and_one_whose_marker_names_a_kernel_runs_once(
    pytester: pytest.Pytester, run_pytest: RunPytest, guest_kernel: Path
) -> None:
    # As in an unpacked package: what lies beside `boot` are the kernel's modules.
    pytester.path.joinpath("lib").symlink_to(guest_kernel.parent.parent / "lib")
    boot = pytester.mkdir("boot")
    kernels = [boot / name for name in ("vmlinuz-old", "vmlinuz-new", "vmlinuz-own")]
    for kernel in kernels:
        kernel.symlink_to(guest_kernel)
    pytester.makepyfile(
        f"""
        import pytest

        def kernel_of(factory):
            vm = factory(wait=False, networks=[])
            assert str(vm.config.kernel) in vm.handle.command
            return vm.config.kernel.name

        def test_each(chvm_vm, record_property):
            record_property("kernel", kernel_of(chvm_vm))

        @pytest.fixture
        def machine(chvm_vm_factory):
            return kernel_of(chvm_vm_factory)

        def test_indirect(machine, record_property):
            record_property("kernel", machine)

        @pytest.mark.chvm(kernel={str(kernels[2])!r})
        def test_named(chvm_vm, record_property):
            record_property("kernel", kernel_of(chvm_vm))

        def test_plain():
            pass
        """
    )
    pytester.makeconftest(
        """
        def pytest_runtest_logreport(report):
            if report.when == "call":
                print("RAN", report.nodeid.split("::")[1], *(value for _, value in report.user_properties))
        """
    )
    result = run_pytest(f"--chvm-kernel={kernels[0]}", f"--chvm-kernel={kernels[1]}", "-s")
    result.assert_outcomes(passed=6)
    release = inspect_kernel(guest_kernel).release
    assert sorted(line.split("RAN ")[1] for line in result.outlines if "RAN " in line) == [
        f"test_each[{release}-vmlinuz-new] vmlinuz-new",
        f"test_each[{release}-vmlinuz-old] vmlinuz-old",
        f"test_indirect[{release}-vmlinuz-new] vmlinuz-new",
        f"test_indirect[{release}-vmlinuz-old] vmlinuz-old",
        "test_named vmlinuz-own",
        "test_plain",
    ]


def test_kernels_that_are_not_there_are_told_apart_by_their_paths(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    pytester.makepyfile("def test_vm(chvm_vm): pass")
    result = run_pytest("--collect-only", "-q", "--chvm-kernel=/linux/6.1/bzImage", "--chvm-kernel=/linux/6.12/bzImage")
    result.stdout.fnmatch_lines(["*::test_vm[[]linux-6.1-bzImage]", "*::test_vm[[]linux-6.12-bzImage]"])


@pytest.mark.parametrize(("missing", "outcome"), [("skip", "1 passed, 3 skipped"), ("fail", "3 failed, 1 passed")])
def test_without_a_vmm_vm_tests_fail_or_are_skipped_with_what_to_install(
    pytester: pytest.Pytester, user_environment: pytest.MonkeyPatch, sandbox: Sandbox, missing: str, outcome: str
) -> None:
    pytester.makepyfile(
        """
        def test_vm(chvm_vm):
            chvm_vm()

        def test_factory(chvm_vm_factory):
            chvm_vm_factory()

        def test_network(chvm_vm, chvm_network):
            chvm_vm(networks=[chvm_network()])

        def test_plain():
            pass
        """
    )
    # A machine without the package: there is no such program that can be run.
    sandbox.run("sh", "-c", "for file in /usr/bin/qemu-system-*; do mount --bind /dev/null $file; done")
    sandbox.take_for_granted()
    command = sandbox.command(sys.executable, "-m", "pytest", "-rs", f"--chvm-missing={missing}", cwd=pytester.path)
    result = pytester.run(*command, timeout=240)
    reason = (
        "qemu-system-* was not found: looked on PATH and in /usr/bin, *; install qemu-system-x86 *, or name one with --chvm-binary"
    )
    shown = {"skip": f"SKIPPED *no VM here: {reason}", "fail": f"E *MissingRequirementError: {reason}"}[missing]
    result.stdout.fnmatch_lines([f"chvm: VMM qemu: *{reason}", shown, f"*{outcome}*"])
    assert not sandbox.left_behind()


def test_chvm_keep_keeps_logs_of_failed_or_all_tests_below_the_artifacts_directory(
    pytester: pytest.Pytester, run_pytest: RunPytest
) -> None:
    pytester.makepyfile(
        """
        def test_passes(chvm_vm):
            chvm_vm(name="good", wait=False, networks=[])

        def test_fails(chvm_vm):
            chvm_vm(name="bad", wait=False, networks=[])
            raise AssertionError("on purpose")
        """
    )
    kept: dict[str, set[str]] = {}
    for keep in ("never", "failed", "always"):
        run_pytest("--chvm-artifacts=logs", f"--chvm-keep={keep}").assert_outcomes(passed=1, failed=1)
        kept[keep] = {path.name for path in pytester.path.glob("logs/**/*.log")}
    bad = {"bad.serial.log", "bad.serial.vmm.log"}
    assert kept == {"never": set(), "failed": bad, "always": bad | {"good.serial.log", "good.serial.vmm.log"}}
    (log,) = pytester.path.glob("logs/**/bad.serial.log")
    assert "test_fails" in log.parent.name

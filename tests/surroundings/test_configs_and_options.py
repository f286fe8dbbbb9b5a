"""What a VM is made of, whoever says it: a config made elsewhere, the marker, options, files of any format."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import RunPytest


def test_what_a_config_does_not_say_is_from_the_marker_the_options_and_the_test(
    pytester: pytest.Pytester, run_pytest: RunPytest, user_environment: pytest.MonkeyPatch, guest: object
) -> None:
    kernel: Path = guest.kernel  # type: ignore[attr-defined]
    pytester.path.joinpath("lib").symlink_to(kernel.parent.parent / "lib")
    kernels = [pytester.mkdir("boot") / "vmlinuz-old", pytester.path / "boot" / "vmlinuz-new"]
    for link in kernels:
        link.symlink_to(kernel)
    pytester.makepyfile(
        """
        import pytest
        from pytest_chvm import VmConfig, launch

        @pytest.mark.chvm(memory_mb=150, network="none", cmdline="console=ttyS0 marker", wait=False, boot="cold")
        @pytest.mark.parametrize("config", [VmConfig(), VmConfig(cmdline="console=ttyS0 config")])
        def test_merged(chvm_vm, config, chvm_kernel, record_property):
            vm = chvm_vm(config)
            assert vm.config.kernel == chvm_kernel
            assert (vm.config.memory_mb, vm.config.cpus, vm.config.namespace) == (150, 2, "main")
            assert vm.config.name.startswith("test-merged-")
            assert (config.cmdline or "console=ttyS0 marker") in vm.config.cmdline
            # The same config again: another VM, with a name of its own.
            other = chvm_vm(config, memory_mb=160, cpus=1)
            assert (other.config.memory_mb, other.config.cpus) == (160, 1)
            assert other.name != vm.name
            record_property("kernel", vm.config.kernel.name)

        def test_without_the_fixture():
            arguments = {"networks": [], "wait": False, "boot": "cold"}
            with launch(VmConfig(), **arguments) as first, launch(VmConfig(), **arguments) as second:
                assert first.name != second.name
                assert first.config.memory_mb == 170
        """
    )
    pytester.makeconftest(
        """
        def pytest_runtest_logreport(report):
            if report.when == "call":
                print("RAN", *(value for _, value in report.user_properties))
        """
    )
    user_environment.setenv("CHVM_CPUS", "2")
    user_environment.setenv("CHVM_MEMORY_MB", "170")
    result = run_pytest("-s", *(f"--chvm-kernel={kernel}" for kernel in kernels))
    result.assert_outcomes(passed=5)
    ran = sorted(line.split("RAN ")[1] for line in result.outlines if "RAN v" in line)
    assert ran == ["vmlinuz-new", "vmlinuz-new", "vmlinuz-old", "vmlinuz-old"]


def test_getfixturevalue_has_the_marker_s_arguments_and_says_where_it_cannot_be_seen(
    pytester: pytest.Pytester, run_pytest: RunPytest, guest: object
) -> None:
    kernel: Path = guest.kernel  # type: ignore[attr-defined]
    pytester.path.joinpath("lib").symlink_to(kernel.parent.parent / "lib")
    kernels = [pytester.mkdir("boot") / "vmlinuz-old", pytester.path / "boot" / "vmlinuz-new"]
    for link in kernels:
        link.symlink_to(kernel)
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.chvm(memory_mb=150, networks=[], wait=False, boot="cold")
        def test_marked(request):
            vm = request.getfixturevalue("chvm_vm")()
            assert vm.config.memory_mb == 150
            assert vm.config.kernel == request.getfixturevalue("chvm_kernel")

        def test_unmarked(request):
            request.getfixturevalue("chvm_vm")(networks=[], wait=False, boot="cold")
            assert request.node.get_closest_marker("chvm")
        """
    )
    result = run_pytest("-v", *(f"--chvm-kernel={kernel}" for kernel in kernels))
    result.assert_outcomes(passed=3, warnings=1)
    result.stdout.fnmatch_lines(
        [
            "*::test_marked[[]*-vmlinuz-old] PASSED*",
            "*::test_marked[[]*-vmlinuz-new] PASSED*",
            "*::test_unmarked PASSED*",
            "*PytestWarning: *::test_unmarked gets its VM by getfixturevalue*mark it with @pytest.mark.chvm*vmlinuz-old",
        ]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chvm-kernel=/no/such/kernel"], "--chvm-kernel (CHVM_KERNEL, chvm_kernel): '/no/such/kernel' does not exist"),
        (["--chvm-initramfs=/"], "--chvm-initramfs (*): '/' is a directory, expected a file"),
        (["--chvm-binary=/etc/passwd"], "--chvm-binary (*): '/etc/passwd' is not executable"),
        (["--chvm-virtiofsd=/no/virtiofsd", "-n", "1"], "--chvm-virtiofsd (*): '/no/virtiofsd' does not exist"),
        (["--chvm-subnet-pool=10.0.0.0/30"], "--chvm-subnet-pool (*): subnet pool '10.0.0.0/30' is too small*"),
        (["--chvm-keep=failed", "--chvm-artifacts=/etc/passwd/logs"], "--chvm-artifacts (*): *'/etc/passwd' is a file"),
        (["--chvm-cmdline=two\nlines"], "--chvm-cmdline (*): *newline*"),
        (["--chvm-cache-dir=/etc/passwd"], "--chvm-cache-dir (*): *'/etc/passwd' is a file"),
    ],
    ids=["kernel", "initramfs", "binary", "virtiofsd-xdist", "pool", "artifacts", "cmdline", "cache"],
)
def test_an_option_that_no_vm_can_have_ends_the_run_at_its_start(
    pytester: pytest.Pytester, run_pytest: RunPytest, arguments: list[str], message: str
) -> None:
    pytester.makepyfile("def test_vm(chvm_vm): raise AssertionError('not reached')\ndef test_plain(): pass")
    result = run_pytest(*arguments) if "-n" in arguments else pytester.runpytest_inprocess(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*ERROR: {message.replace('[', '[[]')}"])
    assert "INTERNALERROR" not in result.stdout.str()


def test_who_only_looks_or_has_no_vm_test_is_not_asked_for_options_of_vms(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    pytester.makepyfile("def test_vm(chvm_vm): raise AssertionError('not reached')\ndef test_plain(): pass")
    run_pytest("-k", "plain", "--chvm-kernel=/no/such/kernel").assert_outcomes(passed=1, deselected=1)
    assert pytester.runpytest_inprocess("--collect-only", "--chvm-kernel=/no/such/kernel").ret == 0


@pytest.mark.parametrize("missing", ["skip", "fail"])
def test_what_the_machine_lacks_is_skipped_wherever_it_shows(
    pytester: pytest.Pytester, run_pytest: RunPytest, missing: str
) -> None:
    pytester.makepyfile(
        """
        import unittest
        import pytest
        from pytest_chvm import MissingRequirementError, launch

        def test_memory(chvm_vm):
            chvm_vm(memory_mb=400)

        def test_networks(chvm_network):
            for _ in range(3):
                chvm_network()

        @pytest.fixture(scope="module")
        def machine(chvm_vm_factory):
            return chvm_vm_factory(memory_mb=400)

        def test_fixture(machine): pass

        def test_launched(chvm_settings):
            launch(memory_mb=400, settings=chvm_settings)

        class TestOfUnittest(unittest.TestCase):
            @pytest.fixture(autouse=True)
            def machines(self, chvm_vm):
                self.boot = chvm_vm

            def test_it(self):
                self.boot(memory_mb=400)

        def test_expects_it(chvm_vm):
            with pytest.raises(MissingRequirementError, match="400 MiB"):
                chvm_vm(memory_mb=400)

        def test_otherwise_wrong(chvm_vm):
            chvm_vm(memory_mb=0)
        """
    )
    result = run_pytest("-rs", f"--chvm-missing={missing}", "--chvm-memory-budget-mb=300", "--chvm-subnet-pool=10.77.0.0/22")
    if missing == "skip":
        result.assert_outcomes(passed=1, failed=1, skipped=5)
        result.stdout.fnmatch_lines(["SKIPPED *test_what*.py:*: no VM here: VM 'test-memory' wants 400 MiB*"])
    else:
        result.assert_outcomes(passed=1, failed=5, errors=1)


@pytest.mark.skipif(pytest.version_tuple < (9,), reason="pytest reads no native TOML before 9")
def test_a_toml_file_s_own_numbers_and_lists_are_values(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    pytester.makepyfile(
        """
        from pathlib import Path

        def test_values(chvm_settings, pytestconfig):
            settings = chvm_settings
            assert (settings.cpus, settings.boot_timeout, settings.vmm) == (2, 2.5, "qemu")
            assert settings.kernel == (Path(pytestconfig.rootpath, "one"), Path("/two"))
        """
    )
    place = pytester.path / "pyproject.toml"
    values = 'chvm_cpus = 2\nchvm_boot_timeout = 2.5\nchvm_vmm = "qemu"\nchvm_kernel = ["one", "/two"]\n'
    for table in ("[tool.pytest]", "[tool.pytest.ini_options]"):
        place.write_text(f"{table}\n{values}")
        run_pytest("--strict-config").assert_outcomes(passed=1)
    for bad in ("0", "true", '["a"]'):
        place.write_text(f"[tool.pytest]\nchvm_cpus = {bad}\n")
        result = pytester.runpytest_inprocess()
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["ERROR: *chvm_cpus*"])


def test_logs_of_each_attempt_worker_and_vm_are_kept_apart(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    pytester.makepyfile(
        """
        import os, pathlib
        import pytest

        def test_flaky(chvm_vm, tmp_path_factory):
            attempts = pathlib.Path("attempts" + os.environ.get("PYTEST_XDIST_WORKER", ""))
            number = len(attempts.read_text()) if attempts.exists() else 0
            attempts.write_text("x" * (number + 1))
            for which in ("first", "second"):
                with chvm_vm(name="same", networks=[]) as vm:
                    vm.check_output(f"echo attempt {number} {which} >/dev/console")
                    vm.wait_for_console(which)
            assert number == 1

        @pytest.mark.parametrize("text", ["a/b", "a:b"])
        def test_of_nearly_one_name(chvm_vm, text):
            chvm_vm(name="same", networks=[], wait=False, boot="cold")
        """
    )
    result = run_pytest("--reruns=2", "--chvm-keep=always", "--chvm-artifacts=logs", "-n", "2", "--dist=each", "-rR")
    result.assert_outcomes(passed=6)
    logs = pytester.path / "logs"
    said = {
        (path.parent.name.partition("test_flaky")[2], path.name): path.read_text().rpartition("attempt ")[2].strip()
        for path in logs.glob("*test_flaky*/*.serial.log")
    }
    assert said == {
        (f"-{worker}{'-attempt-2' * attempt}", f"{name}.serial.log"): f"{attempt} {which}"
        for worker in ("gw0", "gw1")
        for attempt in (0, 1)
        for name, which in (("same", "first"), ("same-2", "second"))
    }
    assert len([*logs.glob("*test_of_nearly_one_name*/same.serial.log")]) == 4


def test_only_the_attempts_that_failed_are_kept_where_that_was_asked_for(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    pytester.makepyfile(
        """
        attempts = []

        def test_flaky(chvm_vm):
            attempts.append(chvm_vm(name=f"vm{len(attempts)}", networks=[], wait=False, boot="cold"))
            assert len(attempts) == 2
        """
    )
    run_pytest("--reruns=2", "--chvm-keep=failed", "--chvm-artifacts=logs").assert_outcomes(passed=1)
    (kept,) = pytester.path.joinpath("logs").iterdir()
    assert kept.name.endswith("-test_flaky")
    assert {log.name.partition(".")[0] for log in kept.iterdir()} == {"vm0"}

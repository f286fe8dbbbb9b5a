"""The fixtures as promised: what each gives, how long it lasts, and the same without pytest."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.leaks import Sandbox
from tests.runs import RunPytest, StartPytest


def test_each_fixture_gives_what_it_promises_and_for_as_long(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    pytester.makepyfile(
        """
        import ipaddress
        import os
        import pathlib
        import pytest
        from pytest_chvm import Settings, SharedDir, VmState

        pids = {}

        def test_settings_and_driver(chvm_settings, chvm_driver):
            assert isinstance(chvm_settings, Settings)
            assert chvm_settings.memory_mb == 256
            assert chvm_driver.vmm == "qemu"
            for operation in ("boot", "stop", "kill", "state", "pause", "resume", "snapshot", "restore"):
                assert callable(getattr(chvm_driver, operation))

        def test_function_scope(chvm_vm, tmp_path):
            (tmp_path / "code").mkdir()
            (tmp_path / "code" / "file").write_text("from the host")
            vm = chvm_vm(memory_mb=200, shared_dirs=[SharedDir("code", tmp_path / "code", read_only=True)], boot_timeout=50)
            assert vm.status.state is VmState.READY
            assert str(ipaddress.ip_address(vm.ip)) == vm.status.ip
            assert vm.name == vm.config.name == vm.handle.name
            assert isinstance(vm.serial_log, pathlib.Path) and isinstance(vm.vmm_log, pathlib.Path)
            assert "CHVM_READY" in vm.console
            assert vm.check_output("cat /mnt/code/file") == "from the host"
            assert vm.run("touch /mnt/code/new").returncode != 0
            assert int(vm.check_output("awk '/MemTotal/ {print $2}' /proc/meminfo")) < 200 * 1024
            pids["function"] = vm.pid

        def test_function_scope_is_over():
            assert not os.path.exists(f"/proc/{pids['function']}")

        @pytest.fixture(scope="module")
        def machine(chvm_vm_factory):
            return chvm_vm_factory()

        def test_first_to_use_a_module_s_vm(machine):
            machine.check_output("echo kept > /tmp/file")
            pids["session"] = machine.pid

        def test_second_to_use_a_module_s_vm(machine):
            assert machine.pid == pids["session"]
            assert machine.check_output("cat /tmp/file") == "kept\\n"
        """
    )
    run_pytest().assert_outcomes(passed=5)


def test_vms_boot_side_by_side_and_reach_each_other_on_a_network_of_their_own(
    pytester: pytest.Pytester, run_pytest: RunPytest
) -> None:
    pytester.makepyfile(
        """
        from pytest_chvm import VmState

        def test_two(chvm_vm, chvm_network):
            network = chvm_network()
            first = chvm_vm(networks=[network], wait=False, boot="cold")
            second = chvm_vm(networks=[network], wait=False, boot="cold")
            assert {first.status.state, second.status.state} <= {VmState.STARTING, VmState.RUNNING}
            assert first.wait_ready() is first
            second.wait_ready()
            assert first.ip != second.ip
            assert "1 packets received" in first.check_output(["ping", "-c", "1", "-W", "5", second.ip])
            second.check_output("echo hello from the second | nc -l -p 80 >/dev/null 2>&1 &")
            assert first.check_output(f"until nc -w 5 {second.ip} 80; do :; done") == "hello from the second\\n"
        """
    )
    run_pytest().assert_outcomes(passed=1)


def test_launch_needs_no_pytest(user_environment: pytest.MonkeyPatch) -> None:
    program = """
import os, sys
from pytest_chvm import VmConfig, VmState, launch

with launch(VmConfig(name="plain"), boot="cold", boot_timeout=50) as vm:
    assert vm.status.state is VmState.READY
    print(vm.check_output("hostname"), end="")
assert not os.path.exists(f"/proc/{vm.pid}")
assert "pytest" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout) == (0, "plain\n"), done.stderr


def test_two_xdist_workers_have_vms_of_their_own_and_leave_nothing(
    pytester: pytest.Pytester, start_pytest: StartPytest, sandbox: Sandbox
) -> None:
    pytester.makepyfile(
        """
        import os
        import pytest

        @pytest.mark.parametrize("number", [1, 2])
        def test_vm(chvm_vm, number):
            vm = chvm_vm(name="same")
            assert vm.check_output("hostname") == "same\\n"
            with open(os.environ["NEWS"], "w") as news:
                print(os.environ["PYTEST_XDIST_WORKER"], vm.ip, file=news)
        """
    )
    run = start_pytest("-n", "2", "--dist=load")
    (first_worker, first_ip), (second_worker, second_ip) = (run.news().split() for _ in range(2))
    assert first_worker != second_worker
    assert first_ip != second_ip
    assert run.wait() == 0
    assert not sandbox.left_behind()
    assert re.search(r"^chvm: VMM qemu\b.*\nchvm: network \w+", run.output, re.MULTILINE), run.output

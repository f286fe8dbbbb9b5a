"""What a run does about bugs that the kernels of its guests report: `--chvm-kernel-splat`."""

TESTS = """
import pytest

def said(number):
    return f"echo 'WARNING: CPU: 0 PID: {number} at kernel/test.c:{number} test+0x1/0x2' >/dev/kmsg"

@pytest.fixture(scope="session")
def vm(chvm_vm_factory):
    return chvm_vm_factory(network="none")

@pytest.fixture
def before(vm):
    vm.run(said(1))

@pytest.fixture
def after(vm):
    yield
    vm.run(said(3))

def test_setup(before): pass
def test_call(vm): vm.run(said(2))
def test_teardown(after): pass
def test_well(vm): vm.run("true")
@pytest.mark.chvm(allow_splats=[r"PID: 4 at"])
def test_allowed(vm): vm.run(said(4))
@pytest.mark.chvm(allow_splats=[r"PID: 4 at"])
def test_allowed_another(vm): vm.run(said(5))
def test_expected(vm):
    with vm.expect_splat("PID: 6 at"):
        vm.run(said(6))
def test_fails_anyway(vm):
    vm.run(said(7))
    assert False, "of its own"
"""


def test_a_splat_fails_the_test_in_which_it_came(pytester, run_pytest):
    pytester.makepyfile(TESTS)
    result = run_pytest("--chvm-kernel-splat=fail")
    result.assert_outcomes(passed=4, failed=3, errors=2)
    result.stdout.fnmatch_lines_random(
        [
            "ERROR *::test_setup*",
            "FAILED *::test_call*",
            "ERROR *::test_teardown*",
            "FAILED *::test_allowed_another*",
            "FAILED *::test_fails_anyway*",
            "E *GuestSplatError: *reported: WARNING: CPU: 0 PID: 2 at kernel/test.c:2 test+0x1/0x2",
            '*While "echo \'WARNING: CPU: 0 PID: 2 *" ran*',
        ]
    )


def test_a_splat_is_said_in_the_summary_and_fails_nothing_by_default(pytester, run_pytest):
    pytester.makepyfile(TESTS)
    result = run_pytest("-n1", "-k", "test_setup or test_call or test_allowed or test_well")
    result.assert_outcomes(passed=5)
    told = result.stdout.str().partition("kernel splats")[2]
    assert "::test_setup (setup): VM session: WARNING: CPU: 0 PID: 1 at" in told
    assert "::test_call: VM session: WARNING: CPU: 0 PID: 2 at" in told
    assert "::test_allowed_another: VM" in told
    assert "PID: 4 at" not in told
    assert "test_well" not in told


def test_a_splat_can_be_ignored(pytester, run_pytest):
    pytester.makepyfile(TESTS)
    result = run_pytest("--chvm-kernel-splat=ignore", "-k", "test_call")
    result.assert_outcomes(passed=1)
    assert "PID: 2 at" not in result.stdout.str()


def test_a_pattern_that_is_none_is_an_error(pytester, run_pytest):
    pytester.makepyfile(TESTS.replace("PID: 4 at", "(PID"))
    result = run_pytest("-k", "test_allowed_another")
    result.stdout.fnmatch_lines(["*InvalidConfigError: allow_splats=*'(PID' is no regular expression: missing )*"])


def test_a_panic_is_in_the_report_with_its_reason_and_its_stack(pytester, run_pytest):
    pytester.makepyfile(
        """
        def test_panic(chvm_vm):
            chvm_vm(network="none").run("echo 1 >/proc/sys/kernel/panic_on_warn; echo c >/proc/sysrq-trigger; sleep 60")
        """
    )
    result = run_pytest()
    result.assert_outcomes(failed=1)
    section = result.stdout.str().partition("- kernel panic of VM test-panic -")[2].partition("console of VM")[0]
    assert "Kernel panic - not syncing: sysrq triggered crash" in section
    assert "sysrq_handle_crash+0x" in section
    assert "---[ end Kernel panic" in section

"""A test that runs in a guest: in a real one, which has the host's file system and another kernel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.runs import RunPytest

from .test_inside_reports import NO_VM

# Written with the place outside of the guest that it writes to.
SEVERAL = """
    import os, signal, socket, subprocess, sys, warnings
    import pytest

    pytestmark = pytest.mark.chvm(inside="module")

    @pytest.mark.parametrize("where", ["tmpfs"])
    def test_mounts(where, tmp_path, monkeypatch, capfd):
        monkeypatch.chdir(tmp_path)
        subprocess.run(["mount", "-t", where, "none", tmp_path], check=True)
        assert os.path.ismount(tmp_path)
        assert os.getuid() == 0 and os.path.exists("/lib/chvm") is False
        open(OUTSIDE, "w").close()
        subprocess.run([sys.executable, "-c", "print(1)"], check=True)
        assert capfd.readouterr().out == "1\\n"
        warnings.warn("from " + socket.gethostname())
        print(open("/proc/cmdline").read())
        assert where != "tmpfs"

    def test_ends():
        assert os.getsid(0) == os.getpid()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        os.kill(os.getpid(), signal.SIGKILL)

    def test_panics():
        with open("/proc/sysrq-trigger", "w") as file:
            file.write("c")
"""
SAYS = """
    import pytest

    @pytest.mark.chvm(inside=True)
    def test_says(said, pytestconfig):
        pytest.skip(f"{said} {pytestconfig.inipath} {pytestconfig.option.tbstyle}")
"""
CONFTEST = """
    import os, random, tempfile, threading, time
    import pytest

    started, told = time.time(), os.environ["TOLD"]
    thread = threading.Thread(target=time.sleep, args=(3600,), daemon=True)
    thread.start()

    @pytest.fixture
    def said():
        assert thread.is_alive() and time.time() - started < 3600
        return VERSION, told, random.random(), os.path.basename(tempfile.mktemp())
"""


@pytest.mark.slow
def test_a_test_runs_in_the_guest_and_fails_when_that_ends_and_each_run_has_the_project_as_it_is(
    pytester: pytest.Pytester, run_pytest: RunPytest, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = pytester.path / "written"
    pytester.makepyfile(test_says=SAYS, test_several=SEVERAL.replace("OUTSIDE", repr(str(outside))))
    pytester.makeconftest(CONFTEST.replace("VERSION", "1"))
    monkeypatch.setenv("TOLD", "first")
    result = run_pytest("-v", "-rfs")
    result.assert_outcomes(failed=3, skipped=1, warnings=1)
    result.stdout.fnmatch_lines(
        [
            "*_ test_mounts[[]tmpfs[]] _*",
            '>       assert where != "tmpfs"',
            "*chvm.*",
            "*_ test_ends _*",
            "PytestEndedError: the pytest in the guest has ended, with exit status 137, before the test had*",
            "*_ test_panics _*",
            "GuestPanicError: *",
            "*console of VM *",
            "*Kernel panic - not syncing: sysrq triggered crash*",
            "*UserWarning: from test-mounts-tmpfs*",
        ]
    )
    assert not outside.exists()

    pytester.makeconftest(CONFTEST.replace("VERSION", "2"))
    pytester.makeini("[pytest]\n")
    monkeypatch.setenv("TOLD", "second")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--tb=line")
    again = run_pytest("-rs", "test_says.py")
    drawn = r"(0\.\d+), '(tmp\w+)'"
    first, second = (re.search(rf"SKIPPED .*: (.*), {drawn}\) (.*)", each.stdout.str()) for each in (result, again))
    assert first is not None
    assert second is not None
    assert (first[1], first[4]) == ("(1, 'first'", "None auto")
    assert (second[1], second[4]) == ("(2, 'second'", f"{pytester.path}/tox.ini line")
    assert first[2] != second[2]
    assert first[3] != second[3]


def test_with_several_kernels_it_runs_once_with_each(pytester: pytest.Pytester, run_pytest: RunPytest, fake_kernel: Path) -> None:
    other = fake_kernel.with_name("bzImage")
    other.write_bytes(fake_kernel.read_bytes())
    pytester.makeconftest(
        f"""{NO_VM}
    def boot(config, factory):
        os.environ["BOOTED"] = str(factory.defaults["kernel"])
        return HostShell(factory), False

    places.boot = boot
    """
    )
    pytester.makepyfile(
        """
        import os
        import pytest

        @pytest.mark.chvm(inside=True)
        def test_kernel(request):
            assert request.node.callspec.id == os.path.basename(os.environ["BOOTED"])
        """
    )
    result = run_pytest(f"--chvm-kernel={fake_kernel}", f"--chvm-kernel={other}", "-v")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*::test_kernel[[]vmlinuz[]] PASSED*", "*::test_kernel[[]bzImage[]] PASSED*"])

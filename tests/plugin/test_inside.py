"""A test that runs in a guest: in a real one, which has the host's file system and another kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import RunPytest

from .test_inside_reports import NO_VM


@pytest.mark.slow
def test_a_test_runs_in_the_guest_and_fails_when_that_panics(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    outside = pytester.path / "written"
    pytester.makepyfile(
        f"""
        import os, socket, subprocess, sys, warnings
        import pytest

        pytestmark = pytest.mark.chvm(inside="module")

        @pytest.mark.parametrize("where", ["tmpfs"])
        def test_mounts(where, tmp_path, monkeypatch, capfd):
            monkeypatch.chdir(tmp_path)
            subprocess.run(["mount", "-t", where, "none", tmp_path], check=True)
            assert os.path.ismount(tmp_path)
            assert os.getuid() == 0 and os.path.exists("/lib/chvm") is False
            open({str(outside)!r}, "w").close()
            subprocess.run([sys.executable, "-c", "print(1)"], check=True)
            assert capfd.readouterr().out == "1\\n"
            warnings.warn("from " + socket.gethostname())
            print(open("/proc/cmdline").read())
            assert where != "tmpfs"

        def test_panics():
            with open("/proc/sysrq-trigger", "w") as file:
                file.write("c")
        """
    )
    result = run_pytest("-v")
    result.assert_outcomes(failed=2, warnings=1)
    result.stdout.fnmatch_lines(
        [
            "*_ test_mounts[[]tmpfs[]] _*",
            '>       assert where != "tmpfs"',
            "*chvm.*",
            "*_ test_panics _*",
            "GuestPanicError: *",
            "*console of VM *",
            "*Kernel panic - not syncing: sysrq triggered crash*",
            "*UserWarning: from test-mounts-tmpfs*",
        ]
    )
    assert not outside.exists()


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

"""The functions of a splat are found in the source, where the kernel was built with debug information."""

import shutil
import subprocess

import pytest

from pytest_chvm.guest.kernels.kernel import Kernel
from pytest_chvm.guest.symbols import debug_kernel, decoded

SOURCE = """\
static volatile int where;

__attribute__((noinline)) int crashes(int x)
{
    where = x;
    return where + 1;
}

__attribute__((noinline)) int calls(int x)
{
    where = 7;
    return crashes(x) + 3;
}

void _start(void) { calls(1); }
"""


@pytest.fixture(scope="module", params=["-gdwarf-4", "-gdwarf-5"])
def tree(request, tmp_path_factory):
    """A directory as a kernel is built in, but for the kernel."""
    if shutil.which("gcc") is None:
        pytest.skip("no compiler here")
    directory = tmp_path_factory.mktemp("tree")
    (directory / "kernel").mkdir()
    (directory / "kernel" / "test.c").write_text(SOURCE)
    (directory / "arch/x86/boot").mkdir(parents=True)
    words = ["gcc", request.param, "-O1", "-nostdlib", "-static", "-fno-stack-protector", "-o", "vmlinux", "kernel/test.c"]
    subprocess.run(words, cwd=directory, check=True)
    return directory


@pytest.fixture(scope="module")
def functions(tree):
    """Start and size of each function, and where in it another one is called."""
    said = subprocess.run(["nm", "-S", "vmlinux"], cwd=tree, check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in said.splitlines()]
    return {row[3]: (int(row[0], 16), int(row[1], 16)) for row in rows if len(row) == 4}


def test_functions_become_files_and_lines(tree, functions):
    (start, crashes), (other, calls) = functions["crashes"], functions["calls"]
    text = (
        f"RIP: 0010:crashes+0x4/0x{crashes:x}\nCall Trace:\n <TASK>\n calls+0x{calls - 1:x}/0x{calls:x}\n"
        f" unknown+0x1/0x2\n calls+0x1/0x{calls + 4096:x}\n crashes+0x1/0x{crashes:x} [module]\n </TASK>"
    )
    addresses = [hex(start + 4), hex(other + calls - 2)]
    said = subprocess.run(["addr2line", "-e", "vmlinux", *addresses], cwd=tree, check=True, capture_output=True, text=True).stdout
    exact, call = (line.split()[0].removeprefix(f"{tree}/") for line in said.splitlines())
    assert exact.startswith("kernel/test.c:")
    lines = decoded(text, tree / "vmlinux").splitlines()
    assert lines[0].endswith(f"crashes+0x4/0x{crashes:x} ({exact})")
    assert lines[3] == f" calls+0x{calls - 1:x}/0x{calls:x} ({call})"
    # Neither an unknown function, nor one of another kernel's, nor one of a module's.
    assert lines[4:7] == text.splitlines()[4:7]


def test_the_kernel_with_debug_information_is_found_from_the_image_in_its_tree(tree):
    image = tree / "arch/x86/boot/bzImage"
    image.write_bytes(b"not looked into")
    assert debug_kernel(Kernel(image, "6.1.0", None)) == tree / "vmlinux"
    assert debug_kernel(Kernel(tree / "vmlinux", None, None)) == tree / "vmlinux"


def test_it_is_found_where_distributions_put_it(tree, tmp_path):
    place = tmp_path / "usr/lib/debug/boot/vmlinux-6.1.0-x"
    place.parent.mkdir(parents=True)
    shutil.copy(tree / "vmlinux", place)
    assert debug_kernel(Kernel(tmp_path / "boot" / "vmlinuz-6.1.0-x", "6.1.0-x", None)) == place
    assert debug_kernel(Kernel(tmp_path / "boot" / "vmlinuz-6.1.0-y", "6.1.0-y", None)) is None


def test_a_damaged_file_leaves_the_text_as_it_is(tree, tmp_path):
    damaged = tmp_path / "vmlinux"
    damaged.write_bytes((tree / "vmlinux").read_bytes()[:3000])
    assert decoded(" calls+0x1/0x20", damaged) == " calls+0x1/0x20"
    assert decoded(" calls+0x1/0x20", tmp_path / "none") == " calls+0x1/0x20"

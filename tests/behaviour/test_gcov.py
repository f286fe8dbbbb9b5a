"""What a kernel has counted of its own lines."""

import os

import pytest

from pytest_chvm import UnsupportedError

# As a kernel that was built in /build has it; the one of these tests was not built for that.
COUNTED = """\
mount -t tmpfs tmpfs /sys/kernel/debug
mkdir -p /sys/kernel/debug/gcov{tree}/lib
cd /sys/kernel/debug/gcov{tree}/lib
touch /sys/kernel/debug/gcov/reset
printf 'a name' >'b c.gcda'
"""


def test_what_was_counted_lies_by_the_paths_of_the_tree(boot, tmp_path):
    vm = boot(networks=[])
    with pytest.raises(UnsupportedError, match="it needs CONFIG_GCOV_KERNEL"):
        vm.collect_gcov(tmp_path / "none")
    tree = tmp_path / "build"
    (tree / "lib").mkdir(parents=True)
    (tree / "lib" / "a.gcno").touch()
    vm.check_output(COUNTED.format(tree=tree))
    own = tmp_path / "own"
    own.mkdir()
    (own / "kept").touch()
    there = own / tree.relative_to("/") / "lib"
    for counted in ("one", "two"):
        vm.check_output(f"printf {counted} >/sys/kernel/debug/gcov{tree}/lib/a.gcda")
        assert vm.collect_gcov(own) == own
        assert (there / "a.gcda").read_text() == counted
        # Links are made again, too.
        assert os.readlink(there / "a.gcno") == f"{tree}/lib/a.gcno"
    assert sorted(os.listdir(there)) == ["a.gcda", "a.gcno", "b c.gcda"]
    assert sorted(os.listdir(own)) == sorted(["kept", tree.parts[1]])
    assert not vm.run("ls -d /tmp/chvm-*").stdout

"""The limits of control groups, of both versions and of those above."""

import pytest

from pytest_chvm.host.limits import cgroup_memory_limits, cgroup_processor_limits


@pytest.fixture
def cgroups(tmp_path):
    def make(membership, files):
        (tmp_path / "membership").write_text(membership)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return tmp_path / "cgroup", tmp_path / "membership"

    return make


def test_version_2_with_the_groups_above(cgroups):
    files = {"a/b/memory.max": "max", "a/memory.max": "1024", "a/b/cpu.max": "150000 100000", "cpu.max": "max 100000"}
    places = cgroups("0::/a/b\n", files)
    assert cgroup_memory_limits(*places) == [1024]
    assert cgroup_processor_limits(*places) == [1.5]


def test_version_1(cgroups):
    files = {
        "memory/a/memory.limit_in_bytes": "2048",
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "cpu/a/cpu.cfs_quota_us": "50000",
        "cpu/a/cpu.cfs_period_us": "100000",
        "cpu/cpu.cfs_quota_us": "-1",
        "cpu/cpu.cfs_period_us": "100000",
    }
    places = cgroups("4:memory:/a\n2:cpu,cpuacct:/a\n1:name=systemd:/\n0::/\n", files)
    assert min(cgroup_memory_limits(*places)) == 2048
    assert cgroup_processor_limits(*places) == [0.5]


def test_a_container_that_sees_the_host_s_path_but_only_its_own_files(cgroups):
    assert cgroup_memory_limits(*cgroups("0::/docker/0123\n", {"memory.max": "4096"})) == [4096]


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert cgroup_memory_limits(tmp_path, tmp_path / "none") == []
    assert cgroup_processor_limits(tmp_path, tmp_path / "none") == []

"""Records of what processes have on the host: whose they are, and what is removed on their word."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_chvm.base import trees
from pytest_chvm.host.keeper import records, remains

NAMES_IT = "import sys, time; print('ready', flush=True); time.sleep(600)"


@pytest.fixture
def runtime_dir(tmp_path):
    directory = tmp_path / "pytest-chvm"
    directory.mkdir()
    return directory


def own(runtime_dir, name="owner", *, boot_id=None, pid=None, ticks=0, lease=None):
    """Make the directory of an owner: by default one that is gone."""
    directory = runtime_dir / name
    (directory / "1").mkdir(parents=True)
    owner = {"boot_id": boot_id or remains.boot_id(), "pid": pid or os.getpid(), "start_time_ticks": ticks, "run": "", "worker": ""}
    (directory / "owner.json").write_text(json.dumps(owner))
    if lease is not None:
        (directory / "1/lease.json").write_text(json.dumps(lease))
    return directory


@pytest.fixture
def program(tmp_path):
    """Start a process that names a file in an argument."""
    started = []

    def start(path, *, session=True):
        process = subprocess.Popen(
            [sys.executable, "-c", NAMES_IT, path], stdout=subprocess.PIPE, start_new_session=session, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def register(directory, process, ticks=None):
    started = remains.start_time_ticks(process.pid) if ticks is None else ticks
    with (directory / "1/processes").open("a") as file:
        file.write(f"{process.pid} {started}\n")


def test_what_a_gone_owner_left_is_removed_with_its_processes(runtime_dir, tmp_path, program):
    elsewhere = tmp_path / "ram"
    elsewhere.write_bytes(b"x")
    directory = own(runtime_dir, lease={"paths": [str(elsewhere)]})
    process = program(directory / "1/api.sock")
    register(directory, process)

    removed, failures = records.remove_abandoned(runtime_dir)

    assert failures == []
    assert removed == [f"process {process.pid} ({os.path.basename(sys.executable)})", str(elsewhere), str(directory)]
    assert process.wait(0) == -9
    assert not elsewhere.exists()
    assert not directory.exists()


def test_a_dry_run_says_the_same_and_removes_nothing(runtime_dir, program):
    directory = own(runtime_dir)
    process = program(directory / "1/api.sock")
    register(directory, process)

    would, _ = records.remove_abandoned(runtime_dir, dry_run=True)

    assert process.poll() is None
    assert directory.exists()
    assert would == records.remove_abandoned(runtime_dir)[0]


def test_what_a_living_owner_or_keeper_has_is_left_alone(runtime_dir):
    import fcntl

    owned = own(runtime_dir, "owned", ticks=remains.start_time_ticks(os.getpid()))
    kept = own(runtime_dir, "kept")
    with (kept / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert records.remove_abandoned(runtime_dir) == ([], [])
    assert owned.exists()
    assert records.remove_abandoned(runtime_dir) == ([str(kept)], [])


def test_an_editor_with_a_log_open_is_not_a_process_of_the_vm(runtime_dir, program):
    directory = own(runtime_dir)
    editor = program(directory / "1/serial.log")

    records.remove_abandoned(runtime_dir)

    assert editor.poll() is None
    assert not directory.exists()


def test_a_process_with_a_recycled_pid_is_not_touched(runtime_dir, program):
    directory = own(runtime_dir)
    recycled = program(directory / "1/api.sock")
    register(directory, recycled, ticks=remains.start_time_ticks(recycled.pid) - 1)

    records.remove_abandoned(runtime_dir)

    assert recycled.poll() is None


FORKS_AND_ENDS = """
import os, sys, time
if os.fork():
    os._exit(0)
print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("place", ["of the lease", "elsewhere"])
def test_what_a_process_has_forked_is_ended_after_it_where_it_names_the_lease(runtime_dir, place):
    directory = own(runtime_dir)
    path = directory / "1/fs0.sock" if place == "of the lease" else "/elsewhere"
    with subprocess.Popen(
        [sys.executable, "-c", FORKS_AND_ENDS, path], stdout=subprocess.PIPE, start_new_session=True, text=True
    ) as process:
        register(directory, process)
        pidfd = os.pidfd_open(int(process.stdout.readline()))
        process.wait()
        records.remove_abandoned(runtime_dir)
        try:
            assert remains.pidfd_ended(pidfd, 0) is (place == "of the lease")
        finally:
            if place == "elsewhere":
                import signal

                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


def test_of_another_boot_no_process_and_no_interface_is_touched(runtime_dir, program, tap_name):
    directory = own(runtime_dir, boot_id="another", lease={"taps": [{"name": tap_name, "netns": None}], "bridges": [tap_name]})
    process = program(directory / "1/api.sock")
    register(directory, process)
    subprocess.run(["ip", "tuntap", "add", "dev", tap_name, "mode", "tap"], check=True)

    assert records.remove_abandoned(runtime_dir)[1] == []

    assert process.poll() is None
    assert remains.interface_is_there(tap_name, None)
    assert not directory.exists()


def test_of_taps_with_similar_names_the_recorded_one_is_removed(runtime_dir, tap_name):
    similar = f"{tap_name}1"
    own(runtime_dir, lease={"taps": [{"name": tap_name, "netns": None}]})
    for name in (tap_name, similar):
        subprocess.run(["ip", "tuntap", "add", "dev", name, "mode", "tap"], check=True)
    try:
        records.remove_abandoned(runtime_dir)
        assert not remains.interface_is_there(tap_name, None)
        assert remains.interface_is_there(similar, None)
    finally:
        subprocess.run(["ip", "link", "del", similar], check=True)


def test_what_cannot_be_removed_keeps_its_record_for_the_next_time(runtime_dir, small_disk):
    # A mount point is busy.
    directory = own(runtime_dir, lease={"paths": [str(small_disk)]})
    (directory / "1/serial.log").write_text("x")

    _removed, failures = records.remove_abandoned(runtime_dir)

    assert failures == [trees.mounted_on(str(small_disk))]
    assert sorted(path.name for path in (directory / "1").iterdir()) == ["lease.json"]
    subprocess.run(["umount", small_disk], check=True)
    assert records.remove_abandoned(runtime_dir)[1] == []
    assert not directory.exists()
    assert not small_disk.exists()
    small_disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "small", small_disk], check=True)


def test_a_directory_whose_owner_died_at_once_is_removed_when_it_is_old(runtime_dir):
    directory = runtime_dir / "stillborn"
    directory.mkdir()
    (directory / "owner.json").touch()
    assert records.remove_abandoned(runtime_dir)[0] == []
    os.utime(directory, (1, 1))
    assert records.remove_abandoned(runtime_dir) == ([str(directory)], [])
    assert not directory.exists()


def test_a_link_is_not_followed(runtime_dir, tmp_path):
    elsewhere = own(tmp_path, "elsewhere")
    (runtime_dir / "link").symlink_to(elsewhere)
    assert records.remove_abandoned(runtime_dir) == (
        [],
        [f"{runtime_dir}/link is not understood (it is no directory): it is left as it is"],
    )
    assert elsewhere.exists()
    directory = own(runtime_dir)
    (directory / "2").symlink_to(tmp_path)
    records.remove_abandoned(runtime_dir)
    assert elsewhere.exists()


@pytest.mark.parametrize(
    "lease",
    [
        {"taps": [{"name": "-all", "netns": None}]},
        {"taps": [{"name": "a b", "netns": None}]},
        {"taps": [{"name": "tap0", "netns": "../../etc"}]},
        {"taps": [{"name": "tap0", "netns": 1}]},
        {"taps": ["tap0"]},
        {"taps": {}},
        {"bridges": ["x" * 16]},
        {"bridges": [None]},
        {"paths": ["relative"]},
        {"paths": ["/"]},
        {"paths": ["//"]},
        {"paths": ["/tmp/.."]},
        {"locks": ["/a\0b"]},
        {"vm": []},
        [],
    ],
    ids=str,
)
def test_a_lease_that_names_what_none_can_is_refused(tmp_path, lease):
    (tmp_path / "lease.json").write_text(json.dumps(lease))
    with pytest.raises(ValueError):
        records.read_lease(str(tmp_path))


@settings(deadline=None)
@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.integers() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["taps", "paths", "vm", "pid", "boot_id", "name"]), x),
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_bytes_are_a_record_or_a_value_error(tmp_path_factory, raw):
    directory = tmp_path_factory.getbasetemp() / "records"
    directory.mkdir(exist_ok=True)
    for name in ("lease.json", "owner.json", "processes"):
        (directory / name).write_bytes(raw)
    for read in (records.read_lease, records.read_owner):
        try:
            assert isinstance(read(str(directory)), dict)
        except ValueError:
            continue
    assert all(type(pid) is int for pid in records.read_pairs(str(directory / "processes")))


def test_a_deeply_nested_or_huge_record_is_refused(tmp_path):
    record = tmp_path / "owner.json"
    for raw in (b"[" * 100_000, b"{}" + b" " * (2 << 20)):
        record.write_bytes(raw)
        with pytest.raises(ValueError):
            records.read_owner(str(tmp_path))

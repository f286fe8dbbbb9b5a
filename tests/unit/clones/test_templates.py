"""The store of templates: built once, used only when they are as they were written, and removed when they are too many."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from pytest_chvm import HostError, InvalidConfigError, QemuDriver, UnsupportedError, VmConfig
from pytest_chvm.clones import store as snapshots
from pytest_chvm.clones.digests import content_key, digest_of
from pytest_chvm.clones.store import RECORD_FILE, Template, TemplateStore, describe
from pytest_chvm.clones.templates import template_config, why_no_clone
from pytest_chvm.drivers.disks import plain_images
from pytest_chvm.guest import renew, renewal
from pytest_chvm.guest.kinds.built_in import BuiltInGuest
from pytest_chvm.guest.kinds.image import ImageGuest
from pytest_chvm.model import SharedDir, Tap, architecture

MADE_OF = {"vmm": ["qemu", "7.2"], "memory_mb": [256, None], "processors": [1, None, None], "networks": ["tap"], "hotplug": False}


@pytest.fixture
def store(tmp_path):
    return TemplateStore(tmp_path)


def save(directory):
    (directory / "memory").write_bytes(b"memory" * 1000)
    (directory / "state").write_bytes(b"state")


def test_a_template_is_built_once_however_many_want_it(store):
    built = []

    def build(directory):
        built.append(directory)
        save(directory)

    found = []
    threads = [threading.Thread(target=lambda: found.append(store.get(MADE_OF, 1, build))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert len({template.directory for template in found}) == 1
    assert Template(found[0].directory).is_intact(wholly=True)


def test_whatever_differs_has_a_template_of_its_own(store):
    keys = {get(store, {**MADE_OF, "memory_mb": [size, None]}).key for size in (128, 256)}
    assert len(keys) == 2


def get(store, made_of=MADE_OF, build=save):
    """Return a template that nobody holds."""
    held = store.get(made_of, 1, build)
    held.release()
    return Template(held.directory)


def damage_size(template):
    with (template.directory / "memory").open("ab") as file:
        file.write(b"x")


def damage_content(template):
    with (template.directory / "memory").open("r+b") as file:
        file.write(b"x")


def lose_file(template):
    (template.directory / "state").unlink()


def swap_file(template):
    state = template.directory / "state"
    found = state.stat()
    state.rename(template.directory / "old")
    state.write_bytes(b"STATE")
    os.utime(state, ns=(found.st_atime_ns, found.st_mtime_ns))


def garble_record(template):
    (template.directory / RECORD_FILE).write_text('{"files": {"memory": 7}}')


def lose_everything(template):
    for file in template.directory.iterdir():
        file.unlink()
    template.directory.rmdir()


@pytest.mark.parametrize("damage", [damage_size, damage_content, lose_file, swap_file, garble_record, lose_everything])
def test_a_damaged_template_is_built_again(store, damage):
    damage(get(store))
    again = get(store)
    assert again.is_intact(wholly=True)
    assert (again.directory / "memory").read_bytes() == b"memory" * 1000
    assert not (again.directory / "old").exists()


def test_a_template_that_was_not_written_out_before_the_host_went_down_is_not_used(store):
    template = get(store)
    memory = template.directory / "memory"
    found = memory.stat()
    memory.write_bytes(bytes(found.st_size))
    os.utime(memory, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert template.is_intact()
    record = json.loads((template.directory / RECORD_FILE).read_text())
    (template.directory / RECORD_FILE).write_text(json.dumps({**record, "boot_id": "an earlier one"}))
    assert not template.is_intact()


def test_a_template_is_read_wholly_once_a_boot_of_the_host(store, monkeypatch):
    template = get(store)
    record = json.loads((template.directory / RECORD_FILE).read_text())
    (template.directory / RECORD_FILE).write_text(json.dumps({**record, "boot_id": "an earlier one"}))
    read = []
    monkeypatch.setattr(snapshots, "digest_of", lambda file: read.append(file.name) or digest_of(file))
    assert template.is_intact()
    assert template.is_intact()
    assert sorted(read) == ["memory", "state"]


def test_a_builder_that_fails_leaves_nothing(store):
    def build(directory):
        save(directory)
        raise InvalidConfigError("the VM did not boot")

    with pytest.raises(InvalidConfigError, match="did not boot"):
        store.get(MADE_OF, 1, build)
    assert [entry.name for entry in store.directory.iterdir() if entry.is_dir()] == []


def test_a_build_that_fails_is_not_repeated_by_each_that_waited_for_it(store):
    started, go_on = threading.Event(), threading.Event()
    failures = []

    def build(directory):
        started.set()
        go_on.wait(120)
        raise InvalidConfigError("the VM did not boot")

    def want():
        try:
            store.get(MADE_OF, 1, build, try_again=False)
        except (InvalidConfigError, HostError) as error:
            failures.append(str(error))

    threads = [threading.Thread(target=want) for _ in range(4)]
    threads[0].start()
    assert started.wait(120)
    for thread in threads[1:]:
        thread.start()
    # They are at the lock once they look for it again and again.
    with pytest.raises(TimeoutError), FileLock(store.directory / f"{only_lock(store)}", timeout=0.5):
        pass
    go_on.set()
    for thread in threads:
        thread.join()
    assert [failure for failure in failures if "did not boot" in failure] == ["the VM did not boot"]
    assert len([failure for failure in failures if "has just failed" in failure]) == 3
    # Whoever comes later tries.
    assert get(store).is_intact()


def only_lock(store):
    """Return the name of the store's one lock file."""
    [lock] = store.directory.glob("*.lock")
    return lock.name


def test_a_builder_that_is_killed_holds_nobody_up_and_leaves_nothing(store):
    script = """
import sys, os, signal
from pathlib import Path
from pytest_chvm.clones.store import TemplateStore
from tests.unit.clones.test_templates import MADE_OF, save
def build(directory):
    save(directory)
    os.kill(os.getpid(), signal.SIGKILL)
TemplateStore(Path(sys.argv[1])).get(MADE_OF, 1, build)
"""
    done = subprocess.run([sys.executable, "-c", script, store.directory.parent], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    template = get(store)
    assert template.is_intact(wholly=True)
    assert [entry.name for entry in store.directory.iterdir() if entry.is_dir()] == [template.key]


def test_what_killed_builders_left_goes_with_the_next_template_whatever_that_is(store):
    kept = get(store)
    left = store.directory / f".{'0' * 32}.left"
    left.mkdir()
    (store.directory / f"{'0' * 32}.lock").touch()
    seen = []

    def build(directory):
        save(directory)
        seen.append(directory)
        # Nor is what is being built just now taken for it.
        store.prune()
        assert directory.is_dir()

    get(store, {**MADE_OF, "memory_mb": [3, None]}, build)
    assert seen
    assert not left.exists()
    assert kept.is_intact()


def test_a_template_is_used_and_a_snapshot_refused_in_a_cache_that_is_read_only(store):
    if os.geteuid() != 0:
        pytest.skip("mounts need root")
    template = get(store)
    script = """
import sys
from pathlib import Path
from pytest_chvm.clones.store import TemplateStore
from pytest_chvm.clones.snapshots import snapshots_dir
from tests.unit.clones.test_templates import MADE_OF
print(TemplateStore(Path(sys.argv[1])).get(MADE_OF, 1, None).directory.name, snapshots_dir(Path(sys.argv[1])).exists())
"""
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$1" -c "$2" "$0"'
    cache = os.fspath(store.directory.parent)
    command = ["unshare", "--mount", "sh", "-c", mount, cache, sys.executable, script]
    assert subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout == f"{template.key} False\n"


def test_a_store_that_cannot_be_written_says_so(store):
    store.directory.write_text("a file")
    with pytest.raises(HostError, match=r"cannot be written.*CHVM_CACHE_DIR"):
        store.get(MADE_OF, 1, save)


def test_a_store_without_room_says_so_before_anything_is_booted(store):
    with pytest.raises(HostError, match=r"may take \d+ MiB and .* MiB free"):
        store.get(MADE_OF, 1 << 40, save)


def test_those_used_longest_ago_are_removed_but_for_those_in_use(store):
    def big(directory):
        (directory / "memory").write_bytes(os.urandom(2 << 20))

    templates = [get(store, {**MADE_OF, "memory_mb": [size, None]}, big) for size in (1, 2)]
    held = store.get({**MADE_OF, "memory_mb": [3, None]}, 1, big)
    templates.append(Template(held.directory))
    for age, template in enumerate(templates):
        os.utime(template.directory / RECORD_FILE, (1e9 - age, 1e9 - age))
    assert [template.key for template in store.all()] == [template.key for template in templates]
    assert store.prune(limit_mb=2) == [templates[1]]
    held.release()
    assert store.prune(limit_mb=2) == [templates[2]]
    assert store.all() == [templates[0]]


def test_a_template_says_what_it_is(store):
    described = describe(get(store), wholly=True)
    assert described["what"] == "qemu, 256 MiB, 1 CPUs, tap"
    assert described["intact"]


@pytest.mark.parametrize("record", ["", "{", "[]", '{"made_of": []}', '{"files": []}', '{"files": {}, "made_of": {"vmm": []}}'])
def test_a_template_whose_record_is_none_is_shown_as_damaged(store, record):
    template = get(store)
    (template.directory / RECORD_FILE).write_text(record)
    described = describe(template, wholly=False)
    assert (described["what"], described["intact"]) == ("its record cannot be read", False)
    assert get(store).is_intact()


def test_a_template_that_was_built_anew_meanwhile_is_not_removed_for_the_old_one(store, monkeypatch):
    template = get(store)
    flock = fcntl.flock
    held = []

    def late(fd, operation):
        if operation == fcntl.LOCK_EX | fcntl.LOCK_NB and not held:
            shutil.rmtree(template.directory)
            held.append(None)
            held[0] = store.get(MADE_OF, 1, save)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert store.prune(-1) == []
    assert template.is_intact()
    held[0].release()


def test_a_template_that_another_process_removes_meanwhile_is_passed_over(store, monkeypatch):
    template = get(store)
    monkeypatch.setattr(TemplateStore, "all", lambda _store: [Template(template.directory.with_name("gone")), template])
    assert store.prune(-1) == [template]


def test_a_file_is_read_again_only_when_it_changed(tmp_path):
    file = tmp_path / "disk"
    file.write_bytes(b"one")
    first = content_key(file, tmp_path / "cache")
    file.write_bytes(b"two")
    assert content_key(file, tmp_path / "cache") != first
    file.write_bytes(b"one")
    assert content_key(file, tmp_path / "cache") == first


@pytest.mark.parametrize("left", [b"", b"12ab", b"x" * 64, b"\xff" * 64])
def test_a_digest_that_was_not_written_wholly_is_computed_again(tmp_path, left):
    file = tmp_path / "disk"
    file.write_bytes(b"one")
    key = content_key(file, tmp_path / "cache")
    [kept] = (tmp_path / "cache" / "digests").iterdir()
    kept.write_bytes(left)
    assert content_key(file, tmp_path / "cache") == key
    assert kept.read_text() == key


def test_digests_that_nobody_wanted_for_a_month_are_removed(store, tmp_path):
    cache = store.directory.parent
    for name in ("new", "old"):
        (tmp_path / name).write_text(name)
        content_key(tmp_path / name, cache)
    for kept in (cache / "digests").iterdir():
        os.utime(kept, (0, 0))
    content_key(tmp_path / "new", cache)
    store.prune()
    assert len(list((cache / "digests").iterdir())) == 1


def test_only_what_a_clone_can_have_is_cloned(tmp_path):
    can = VmConfig(networks=[Tap()], shared_dirs={"a": tmp_path}, data_disk=tmp_path)

    def why(config):
        return why_no_clone(BuiltInGuest(config), QemuDriver(), network_mode="tap")

    assert why(can) is None
    assert why(VmConfig(seed_iso=tmp_path)) is None
    assert "channels" in why(VmConfig(channels=["a"]))


@pytest.mark.parametrize(
    ("asked", "more", "why"),
    [
        ({"cmdline": "quiet"}, {}, None),
        ({"cmdline": "quiet", "root_disk": Path(__file__), "networks": [Tap(mac="52:54:00:00:00:07")]}, {}, None),
        ({"root_disk": Path(__file__), "networks": []}, {}, None),
        ({"root_disk": Path(__file__)}, {"network_mode": "none"}, None),
        ({"root_disk": Path("/dev/null"), "networks": []}, {}, "is not a plain file"),
        ({"root_disk": Path("gone"), "networks": []}, {}, "is not a plain file"),
        ({"cmdline": "quiet", "netns": "mine", "networks": [Tap()]}, {}, "in a network namespace"),
        ({}, {}, "give it a cmdline"),
        ({"cmdline": "quiet"}, {"network_mode": "user"}, "by a TAP of ours"),
        ({"cmdline": "quiet", "networks": [Tap("mine")]}, {}, "by a TAP of ours"),
        ({"cmdline": "quiet", "seed_iso": Path("seed")}, {}, None),
        ({"cmdline": "quiet", "data_disk": Path("disk")}, {}, "when it boots"),
        ({"cmdline": "quiet", "shared_dirs": {"a": Path("dir")}}, {}, "when it boots"),
    ],
)
def test_only_an_image_that_a_clone_can_be_renewed_of_is_cloned(asked, more, why):
    found = why_no_clone(ImageGuest(VmConfig(**asked)), QemuDriver(), **{"network_mode": "tap", **more})
    assert why in found if why else found is None


def test_a_template_has_nothing_of_the_vm_that_asked_for_it(tmp_path):
    asked = VmConfig(networks=[Tap("tap7", "52:54:00:00:00:07")], netns="mine", shared_dirs=[SharedDir("a", tmp_path)]).replace(
        data_disk=tmp_path
    )
    booted = template_config(asked)
    assert (booted.networks, booted.netns, booted.data_disk, booted.shared_dirs) == ((Tap(),), None, None, ())
    assert booted.hotplug


def test_the_guests_program_takes_the_message_that_is_made_for_it(tmp_path):
    program = tmp_path / "renew"
    program.write_bytes(renew.program(architecture(None)))
    program.chmod(0o755)
    call = renew.call("1" * renew.TOKEN_SIZE)
    # Half a message is none, and this machine's clock is left alone.
    short = call + renew.message(0, bytes(renew.SEED_SIZE))[:-1]
    message = renew.message(0, bytes(renew.SEED_SIZE))
    for told, said in ((b"", b""), (short, b"\n" + call), (call[:-1], b""), (renew.AWAY + message, b"")):
        done = subprocess.run([program], input=told, stdout=subprocess.PIPE, timeout=120, check=False)
        assert (done.returncode, done.stdout) == (1, b"waits\n" + said)
    with pytest.raises(ValueError, match="32 characters"):
        renew.call("short")
    with pytest.raises(ValueError, match="32 bytes"):
        renew.message(0, b"short")


def test_a_template_of_another_user_is_not_readable(store):
    template = get(store)
    assert template.directory.stat().st_mode & 0o777 == 0o700


def test_that_there_can_be_no_template_is_found_out_once(store):
    asked = []

    def build(directory):
        save(directory)
        asked.append(directory)
        raise UnsupportedError("no shell")

    for _ in range(2):
        with pytest.raises(UnsupportedError, match="no shell"):
            store.get(MADE_OF, 1, build, try_again=False)
    assert len(asked) == 1
    [known] = store.all()
    assert [file.name for file in known.directory.iterdir()] == [RECORD_FILE]
    assert "no template: no shell" in describe(known, wholly=False)["what"]
    # Who insists finds out anew.
    get(store)
    assert Template(known.directory).unfit is None


def test_a_template_that_was_called_unfit_is_made_anew_for_who_insists(store):
    held = store.get(MADE_OF, 1, save)
    held.call_unfit("its clone failed: \udcff")
    held.release()
    with pytest.raises(UnsupportedError, match="its clone failed"):
        store.get(MADE_OF, 1, save, try_again=False)
    assert "no template: its clone failed" in describe(store.all()[0], wholly=False)["what"]
    assert Template(get(store).directory).unfit is None
    # Of one that was removed meanwhile there is nothing to say.
    shutil.rmtree(held.directory)
    held.call_unfit("gone")
    get(store)


def test_that_there_can_be_no_template_is_not_believed_for_ever(store):
    def build(_directory):
        raise UnsupportedError("no shell")

    with pytest.raises(UnsupportedError):
        store.get(MADE_OF, 1, build)
    [known] = store.all()
    an_hour_ago_s = time.time() - 3600
    os.utime(known.directory / RECORD_FILE, (an_hour_ago_s, an_hour_ago_s))
    store.get(MADE_OF, 1, save, try_again=False).release()


def test_what_was_wanted_before_is_remembered_for_a_month(store):
    assert not store.wanted_before(MADE_OF)
    assert not store.wanted_before(MADE_OF)
    store.want(MADE_OF)
    assert store.wanted_before(MADE_OF)
    assert not store.wanted_before({**MADE_OF, "memory_mb": [128, None]})
    store.prune()
    assert store.wanted_before(MADE_OF)
    for note in store.directory.glob("*.wanted"):
        os.utime(note, (0, 0))
    store.prune()
    assert not store.wanted_before(MADE_OF)


def test_a_ready_marker_is_text_to_the_guests_shell():
    line = renewal.line(["chvm.marker=$(poweroff);x"])
    assert line.isascii()
    assert "chvm_configure 'chvm.marker=$(poweroff);x'" in line


def test_how_a_file_system_keeps_a_file_is_none_of_its_content(tmp_path):
    kept = tmp_path / "kept"
    with kept.open("wb") as file:
        file.truncate(8 << 20)
        for position in (100, 3 << 20, (8 << 20) - 5):
            file.seek(position)
            file.write(b"data")
    full = tmp_path / "full"
    full.write_bytes(kept.read_bytes())
    assert content_key(kept, tmp_path) == content_key(full, tmp_path)
    moved = tmp_path / "moved"
    moved.write_bytes(kept.read_bytes().replace(b"data" + bytes(4), bytes(4) + b"data"))
    assert content_key(moved, tmp_path) != content_key(full, tmp_path)


def test_an_image_that_goes_its_own_way_with_addresses_has_no_clones():
    def run(_command, _data):
        raise AssertionError("nothing is to be done with it")

    for ip, words in (("192.0.2.1", []), ("192.0.2.1", ["chvm.ip=198.18.0.2", "quiet"])):
        with pytest.raises(UnsupportedError, match=r"says that its address is 192.0.2.1, and was told"):
            renewal.put_into(run, ip, words, architecture(None), trial=False)


def test_a_disk_that_is_not_wholly_in_its_file_is_told(tmp_path):
    disk = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", disk, "1M"], check=True)
    with pytest.raises(UnsupportedError, match="has its data in another file"):
        plain_images(disk)
    overlay = tmp_path / "overlay.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", disk, overlay], check=True)
    with pytest.raises(UnsupportedError, match="has its data in another file"):
        plain_images(overlay)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b", "nbd://192.0.2.1", overlay, "1M"], check=True
    )
    with pytest.raises(UnsupportedError, match="is not a plain file"):
        plain_images(overlay)


def test_a_clone_whose_random_pool_could_not_be_renewed_is_never_ready(tmp_path):
    for status, said in ((0, "ready\n"), (1, "")):
        console = tmp_path / "console"
        console.touch()
        waiting = renewal.waiting_line("chvm_renewed=1", "token").replace("/dev/hvc0", str(console))
        lines = f"chvm_renew='exit_with {status}'; exit_with() {{ return $1; }}; chvm_configure() {{ echo ready; }}; {waiting}\n"
        lines += renewal.line(["chvm.ip=192.0.2.1"])
        done = subprocess.run(["sh", "-c", lines], capture_output=True, text=True, timeout=120, check=False)
        assert done.stdout == said

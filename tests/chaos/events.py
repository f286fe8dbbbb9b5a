"""What can befall a run with VMs: one table, and a small function for each that is done from outside."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGSTOP, SIGTERM

from pytest_chvm.host.keeper.remains import boot_id
from tests.chaos.scene import Scene, pause

PLAIN, WORKERS = "plain", "n2"
BOTH = (PLAIN, WORKERS)
SMALL_DISK = "/run/small"

Act = Callable[[Scene], None]


@dataclass(frozen=True)
class Event:
    """A victim, a test of `victims.py`, and what is done once it has told `news`.

    `says` is a pattern of what the person at the terminal must be told (`workers_say`: with workers, where that is something else); `status` the run's exit status, plain. `quick` names the
    set-ups in which it is a part of `make test`. `prepare` comes before the run, and `clean_up` undoes it.
    """

    name: str
    victim: str
    act: Act = lambda scene: None
    options: tuple[str, ...] = ()
    news: str = "started"
    says: str = ""
    workers_say: str | None = None
    status: int | None = None
    owner_dies: bool = False
    set_ups: tuple[str, ...] = BOTH
    quick: tuple[str, ...] = ()
    of_the_vmm: bool = False
    # What it does to the machine is for none but the lab.
    in_lab_only: bool = False
    environment: tuple[tuple[str, str], ...] = ()
    prepare: Act = lambda scene: None
    clean_up: Act = lambda scene: None


def send(number: signal.Signals) -> Act:
    """A signal to the whole run, as from a terminal or a CI system that ends a process group."""
    return lambda scene: scene.run.signal_all(number)


def send_first(number: signal.Signals) -> Act:
    """A signal to the process that was started as pytest: with workers, their controller."""
    return lambda scene: scene.run.signal(number)


def send_victim(number: signal.Signals) -> Act:
    """A signal to the process that runs the victim: with workers, one of them."""
    return lambda scene: os.kill(scene.victim["owner"], number)


def send_vmm(number: signal.Signals) -> Act:
    """A signal to the VMM."""
    return lambda scene: os.kill(scene.victim["vmm"], number)


def send_virtiofsd(number: signal.Signals) -> Act:
    """A signal to the virtiofsd of the shared dir."""
    return lambda scene: os.kill(scene.victim["sidecars"][0], number)


def ctrl_c_twice(milliseconds: int) -> Act:
    """Ctrl-C in the test, and another so long after its teardown has begun."""

    def act(scene: Scene) -> None:
        scene.run.wait_told(scene.victim["test"], "waits")
        scene.run.signal_all(SIGINT)
        scene.run.wait_told(scene.victim["test"], "teardown")
        pause(milliseconds / 1000)
        scene.run.signal_all(SIGINT)

    return act


def once(what: str, then: Act) -> Act:
    """Do it when the victim has told so."""

    def act(scene: Scene) -> None:
        scene.run.wait_told(scene.victim["test"], what)
        then(scene)

    return act


def kill_keeper(scene: Scene) -> None:
    """SIGKILL for the process that cleans up after the victim's: the VMM's parent."""
    os.kill(scene.victim["keeper"], SIGKILL)


def kill_keepers_and_all(scene: Scene) -> None:
    """SIGKILL for everybody who could clean up; stopped before, so that none of them sees another's end."""
    keepers = [pid for pid, command in scene.sandbox.processes().items() if "keeper.py" in command]
    for number in (SIGSTOP, SIGKILL):
        scene.run.signal_all(number)
        for keeper in keepers:
            os.kill(keeper, number)
    scene.run.wait()
    assert not scene.left_behind().pids
    assert scene.left_behind(), "this event leaves nothing to clean up"


def kill_keepers_and_all_and_run_again(scene: Scene) -> None:
    """The next run cleans up before it starts anything."""
    kill_keepers_and_all(scene)
    with scene.start("test_bystander") as run:
        run.release("go")
        assert run.wait() == 0, run.output


def kill_keepers_and_all_and_reap(scene: Scene) -> None:
    """The person at the terminal cleans up."""
    kill_keepers_and_all(scene)
    reap = scene.sandbox.command(sys.executable, "-m", "pytest_chvm.cli", "reap")
    done = subprocess.run(reap, capture_output=True, text=True, timeout=120, check=False, env=scene.neighbourhood.environment)
    assert done.returncode == 0, done.stdout + done.stderr


def stop_vmm_and_kill_all(scene: Scene) -> None:
    """A VMM that cannot act on a signal, when the run is killed."""
    os.kill(scene.victim["vmm"], SIGSTOP)
    scene.run.signal_all(SIGKILL)


def remove_run_directory(scene: Scene) -> None:
    """Somebody tidies /run."""
    shutil.rmtree(scene.sandbox.path(scene.victim["run_dir"]).parent)


def remove_tap(scene: Scene) -> None:
    """Somebody removes an interface."""
    scene.sandbox.run("ip", "link", "del", scene.victim["taps"][0])


def add_netns(scene: Scene) -> None:
    """A namespace of the user's own."""
    scene.sandbox.run("ip", "netns", "add", "victims")


def remove_netns(scene: Scene) -> None:
    """The namespace goes, and whatever else goes with it."""
    if scene.sandbox.path("/run/netns/victims").exists():
        scene.sandbox.run("ip", "netns", "del", "victims")


def mount_small_disk(scene: Scene) -> None:
    """A disk of 4 MiB."""
    scene.sandbox.run("mkdir", SMALL_DISK)
    scene.sandbox.run("mount", "-t", "tmpfs", "-o", "size=4m", "small", SMALL_DISK)


def remove_small_disk(scene: Scene) -> None:
    """Nothing of ours may be on it: the run directory is there."""
    place = scene.sandbox.path(SMALL_DISK)
    if place.exists():
        left = [str(entry) for entry in place.rglob("*") if not {"filler", "base"}.intersection(entry.parts)]
        scene.sandbox.run("umount", "-l", SMALL_DISK)
        scene.sandbox.run("rmdir", SMALL_DISK)
        assert not left, left


def set_clock_back(scene: Scene) -> None:
    """The machine's clock goes back an hour, as when it is set for the first time after a boot."""
    check_lab()
    time.clock_settime(time.CLOCK_REALTIME, time.time() - 3600)


def take_memory_away(scene: Scene) -> None:
    """The VMM may have no more memory than it has: the kernel kills it for the next page."""
    check_lab()
    root = Path("/sys/fs/cgroup")
    (root / "cgroup.subtree_control").write_text("+memory")
    group = root / "victim"
    group.mkdir()
    (group / "memory.max").write_text("1M")
    (group / "cgroup.procs").write_text(str(scene.victim["vmm"]))


def check_lab() -> None:
    """Raise where this is somebody's machine."""
    assert boot_id() != os.environ["CHVM_CHAOS_IN_LAB"], "this is for the lab alone"


def remove_group(scene: Scene) -> None:
    """The group, which is empty by now."""
    if (group := Path("/sys/fs/cgroup/victim")).exists():
        group.rmdir()


EVENTS = (
    # A run that goes on, or ends by itself.
    Event("set-up-raises", "test_set_up_raises", status=1, says="RuntimeError: in set-up"),
    Event("test-fails", "test_fails", status=1, says="on purpose"),
    Event("test-fails-with-x", "test_fails", options=("-x",), status=1, says="on purpose"),
    Event("teardown-raises", "test_teardown_raises", status=1, says="RuntimeError: in teardown"),
    Event("pytest-exit", "test_pytest_exit", status=7, says="that is all", workers_say=""),
    Event("rerun", "test_is_rerun", options=("--reruns=3",), status=0, says="2 rerun"),
    Event("forked-child-crashes", "test_forks_and_the_child_crashes_with_a_vm", owner_dies=True, status=0),
    # Ctrl-C.
    Event(
        "ctrl-c-in-test",
        "test_waits",
        once("waits", send(SIGINT)),
        status=2,
        says="KeyboardInterrupt",
        quick=(PLAIN,),
        of_the_vmm=True,
    ),
    Event("ctrl-c-in-set-up", "test_waits_for_a_boot", once("boots", send(SIGINT)), status=2, says="KeyboardInterrupt"),
    Event("ctrl-c-in-teardown", "test_waits_in_teardown", once("teardown", send(SIGINT)), status=2, says="KeyboardInterrupt"),
    *(
        Event(f"second-ctrl-c-{ms}-ms-into-teardown", "test_waits_and_has_a_teardown", ctrl_c_twice(ms), quick=quick)
        for ms, quick in ((0, ()), (3, ()), (10, (PLAIN,)), (30, ()), (100, ()))
    ),
    # Other signals: to all of the run, to the controller alone, to a worker alone.
    Event("sigterm", "test_waits", once("waits", send(SIGTERM)), owner_dies=True),
    Event("sighup", "test_waits", once("waits", send(SIGHUP)), owner_dies=True),
    Event("sigkill", "test_waits", once("waits", send(SIGKILL)), owner_dies=True, quick=BOTH, of_the_vmm=True),
    Event("sigkill-in-set-up", "test_waits_for_a_boot", once("boots", send(SIGKILL)), owner_dies=True),
    Event("sigkill-in-teardown", "test_waits_in_teardown", once("teardown", send(SIGKILL)), owner_dies=True),
    Event("controller-ctrl-c", "test_waits", once("waits", send_first(SIGINT)), owner_dies=True, set_ups=(WORKERS,)),
    Event("controller-sigterm", "test_waits", once("waits", send_first(SIGTERM)), owner_dies=True, set_ups=(WORKERS,)),
    Event("controller-sigkill", "test_waits", once("waits", send_first(SIGKILL)), owner_dies=True, set_ups=(WORKERS,)),
    Event(
        "worker-sigkill",
        "test_waits",
        once("waits", send_victim(SIGKILL)),
        owner_dies=True,
        set_ups=(WORKERS,),
        says="crashed while running",
    ),
    Event(
        "worker-sigterm",
        "test_waits",
        once("waits", send_victim(SIGTERM)),
        set_ups=(WORKERS,),
    ),
    # The process dies from within.
    Event("os-exit", "test_ends_its_process", owner_dies=True, status=3),
    Event("sigsegv", "test_crashes", owner_dies=True, status=-signal.SIGSEGV),
    Event("sigkill-of-itself", "test_kills_itself", owner_dies=True, status=-SIGKILL, quick=(WORKERS,)),
    Event(
        "forked-child-holds-every-descriptor",
        "test_dies_and_a_child_holds_every_descriptor",
        once("child", lambda scene: None),
        owner_dies=True,
    ),
    Event("program-of-the-test-lives-on", "test_dies_and_a_program_lives_on", once("child", lambda scene: None), owner_dies=True),
    # pytest-timeout.
    *(
        Event(
            f"timeout-{method}-in-{step}",
            victim,
            options=("--timeout=2", f"--timeout-method={method}"),
            status=1,
            says="Timeout",
            workers_say=workers_say,
        )
        # A worker's own words are lost with it.
        for method, workers_say in (("signal", "Timeout"), ("thread", "crashed while running"))
        for step, victim in (("test", "test_waits"), ("set-up", "test_waits_for_a_boot"), ("teardown", "test_waits_in_teardown"))
    ),
    # The keeper.
    Event("keeper-killed", "test_runs_a_command", kill_keeper, status=1, says=r"keeper process \(pid \d+\) is gone"),
    Event(
        "keeper-and-pytest-killed", "test_waits", once("waits", kill_keepers_and_all_and_run_again), status=-SIGKILL, quick=(PLAIN,)
    ),
    Event("keeper-and-pytest-killed-then-reap", "test_waits", once("waits", kill_keepers_and_all_and_reap), status=-SIGKILL),
    # The VMM, the guest, the sidecars.
    Event(
        "vmm-killed",
        "test_runs_a_command",
        send_vmm(SIGKILL),
        status=1,
        says="was killed by signal 9",
        quick=(PLAIN,),
        of_the_vmm=True,
    ),
    Event(
        "vmm-stopped",
        "test_runs_a_command_that_times_out",
        send_vmm(SIGSTOP),
        status=1,
        says="within 2 s",
        quick=(PLAIN,),
        of_the_vmm=True,
    ),
    Event("vmm-stopped-and-run-killed", "test_waits", once("waits", stop_vmm_and_kill_all), owner_dies=True, of_the_vmm=True),
    Event("api-unresponsive", "test_asks_the_api", send_vmm(SIGSTOP), status=1, says="did not answer", of_the_vmm=True),
    Event("guest-powers-off", "test_powers_off", status=1, says="ended with status 0|powered itself off", of_the_vmm=True),
    Event("guest-reboots", "test_reboots", status=1, says="ended with status 0|guest rebooted", of_the_vmm=True),
    Event("guest-panics", "test_panics", status=1, says="Kernel panic|panicked", of_the_vmm=True),
    Event("guest-fills-its-disk", "test_fills_its_disk", status=1, says="No space left on device", of_the_vmm=True),
    Event(
        "virtiofsd-killed",
        "test_looks_into_its_shared_dir",
        send_virtiofsd(SIGKILL),
        status=1,
        says="virtiofsd .* was killed by signal 9",
        of_the_vmm=True,
    ),
    Event(
        "virtiofsd-stopped",
        "test_looks_into_its_shared_dir",
        send_virtiofsd(SIGSTOP),
        status=1,
        says="within 2 s",
        quick=(PLAIN,),
        of_the_vmm=True,
    ),
    # The host.
    Event("run-directory-removed", "test_ends_on_its_own_after_what_was_done", remove_run_directory),
    Event("tap-removed", "test_ends_on_its_own_after_what_was_done", remove_tap, status=0),
    Event(
        "killed-with-a-vm-in-a-namespace",
        "test_waits_in_a_namespace",
        send(SIGKILL),
        owner_dies=True,
        prepare=add_netns,
        clean_up=remove_netns,
    ),
    Event("namespace-removed", "test_in_a_namespace", remove_netns, status=0, prepare=add_netns, clean_up=remove_netns),
    Event(
        "disk-of-the-run-directory-full",
        "test_starts_with_a_full_disk",
        news="full",
        status=1,
        says="No space left on device",
        environment=(("PLACE", SMALL_DISK), ("XDG_RUNTIME_DIR", SMALL_DISK)),
        prepare=mount_small_disk,
        clean_up=remove_small_disk,
    ),
    Event(
        "disk-of-the-logs-full",
        "test_starts_with_a_full_disk",
        news="full",
        options=(f"--basetemp={SMALL_DISK}/base", "--chvm-boot-timeout=10"),
        environment=(("PLACE", SMALL_DISK),),
        status=1,
        says="No space left on device|is full",
        prepare=mount_small_disk,
        clean_up=remove_small_disk,
    ),
    Event(
        "disk-of-the-logs-fills-up",
        "test_fills_the_disk_its_console_is_on",
        options=(f"--basetemp={SMALL_DISK}/base",),
        environment=(("PLACE", SMALL_DISK),),
        prepare=mount_small_disk,
        clean_up=remove_small_disk,
    ),
    Event(
        "clock-set-back",
        "test_survives_a_command_that_hangs",
        set_clock_back,
        status=0,
        of_the_vmm=True,
        in_lab_only=True,
    ),
    Event(
        "vmm-killed-for-want-of-memory",
        "test_uses_more_memory",
        take_memory_away,
        status=1,
        says="was killed by signal 9",
        of_the_vmm=True,
        in_lab_only=True,
        clean_up=remove_group,
    ),
)

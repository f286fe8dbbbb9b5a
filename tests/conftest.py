"""Stand-ins for programs that cannot run everywhere, and the guest that all real VMs of these tests boot.

A stand-in is a real executable in a directory of the test's that is first on PATH: a real child of the keeper, with real signals,
descriptors and exit statuses. It writes down what it was given, and does what the test told it to.
"""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import uuid

import hypothesis
import pytest

from pytest_chvm.base.deadline import Deadline
from pytest_chvm.base.watch import FileWatch
from pytest_chvm.host.host import default_host
from pytest_chvm.host.keeper.records import read_pairs
from pytest_chvm.host.keeper.remains import start_time_ticks
from pytest_chvm.host.networks.tap import interface_exists, why_no_taps

# How long an example takes says how busy the machine is, not how good the code.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")

# Of what is to happen at once, where it would take twice as long and more otherwise; the rest is a busy machine's.
AT_ONCE_S = 30.0

PROLOGUE = """\
#!{python} -IS
import json, os, signal, socket, sys

HERE = os.path.dirname(os.path.realpath(__file__))
DO = json.load(open(os.path.join(HERE, {name!r} + ".json")))
if "--version" in sys.argv:
    print(DO["version"])
    sys.exit(DO["version_status"])


def option(name):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else None


def record():
    descriptors = {{int(fd): os.readlink("/proc/self/fd/" + fd) for fd in os.listdir("/proc/self/fd") if os.path.lexists("/proc/self/fd/" + fd)}}
    what = {{"argv": sys.argv, "pid": os.getpid(), "environment": dict(os.environ), "descriptors": descriptors, "cwd": os.getcwd()}}
    unfinished = os.path.join(HERE, "unfinished-%d" % os.getpid())
    with open(unfinished, "w") as file:
        json.dump(what, file)
    os.rename(unfinished, os.path.join(HERE, "{name}-%d.record" % os.getpid()))


signal.signal(signal.SIGTERM, signal.SIG_IGN if DO["ignores_sigterm"] else lambda *_: os._exit(0))
signal.signal(signal.SIGUSR1, lambda *_: os._exit(DO["status_on_usr1"]))
sys.stderr.write(DO["says"])
sys.stderr.flush()
"""

CLOUD_HYPERVISOR = (
    PROLOGUE
    + """
serial = (option("--serial") or "").removeprefix("file=")
if serial.startswith('"'):
    serial = serial[1:-1].replace('""', '"')
with open(serial, "ab") as file:
    file.write(DO["serial"].encode("latin-1"))
record()
if DO["exits_with"] is not None:
    sys.exit(DO["exits_with"])
api = socket.socket(fileno=int(option("--api-socket").removeprefix("fd=")))
while True:
    client, _ = api.accept()
    request = b""
    while b"\\r\\n\\r\\n" not in request:
        request += client.recv(65536)
    with open(os.path.join(HERE, "requests"), "ab") as file:
        file.write(request.split(b"\\r\\n")[0] + b"\\n")
    status, body = DO["answers"].get(request.split()[1].decode().rsplit("/", 1)[1], [204, ""])
    client.sendall(b"HTTP/1.1 %d X\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (status, len(body), body.encode()))
    client.close()
"""
)

VIRTIOFSD = (
    PROLOGUE
    + """
record()
if DO["exits_with"] is not None:
    sys.exit(DO["exits_with"])
path = next(word for word in sys.argv if word.startswith("--socket-path=")).removeprefix("--socket-path=")
if DO["makes_socket"] and not any(word in " ".join(sys.argv) for word in DO["no_socket_for"]):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    if DO["listens"]:
        listener.listen()
while True:
    signal.pause()
"""
)

DEFAULTS = {
    "version": "",
    "version_status": 0,
    "ignores_sigterm": False,
    "status_on_usr1": 3,
    "says": "",
    "serial": "",
    "exits_with": None,
    "answers": {},
    "makes_socket": True,
    "no_socket_for": [],
    "listens": True,
}


class StandIn:
    """A recording executable. `does(...)` says what its next process does; `record(pid)` is what that one wrote down."""

    def __init__(self, directory, name, script, version):
        self.name = name
        self.directory = directory
        self.path = directory / name
        self.version = version
        directory.mkdir(exist_ok=True)
        self.does()
        self.path.write_text(script.format(python=sys.executable, name=name))
        self.path.chmod(0o755)

    def does(self, **behaviour):
        assert behaviour.keys() <= DEFAULTS.keys()
        unfinished = self.directory / f"{self.name}.new"
        unfinished.write_text(json.dumps({**DEFAULTS, "version": self.version, **behaviour}))
        unfinished.replace(self.directory / f"{self.name}.json")

    def record(self, pid):
        path = self.directory / f"{self.name}-{pid}.record"
        wait_for_file(path)
        return json.loads(path.read_text())

    def records(self):
        return [json.loads(path.read_text()) for path in sorted(self.directory.glob(f"{self.name}-*.record"))]

    @property
    def requests(self):
        path = self.directory / "requests"
        return path.read_text().splitlines() if path.exists() else []


def wait_for_file(path, timeout_s=AT_ONCE_S):
    with FileWatch(path.parent) as watch:
        deadline = Deadline.after(timeout_s)
        while not path.exists():
            assert not deadline.expired, f"{path} did not appear within {timeout_s} s"
            watch.wait(deadline)


@pytest.fixture(name="wait_for_file")
def wait_for_file_fixture():
    return wait_for_file


@pytest.fixture
def bin_dir(tmp_path_factory, monkeypatch):
    """A directory that is first on PATH, for stand-ins."""
    directory = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    return directory


@pytest.fixture
def stand_in_ch(bin_dir):
    """A `cloud-hypervisor` that boots nothing."""
    return StandIn(bin_dir, "cloud-hypervisor", CLOUD_HYPERVISOR, "cloud-hypervisor v53.0.0")


@pytest.fixture
def stand_in_virtiofsd(bin_dir):
    """A `virtiofsd`, the Rust one by its version, that serves nothing."""
    return StandIn(bin_dir, "virtiofsd", VIRTIOFSD, "virtiofsd 1.14.0")


@pytest.fixture
def fake_kernel(tmp_path_factory):
    """A file with a bzImage's magic number: for those that only look at it."""
    image = tmp_path_factory.mktemp("boot") / "vmlinuz"
    image.write_bytes(bytes(0x202) + b"HdrS" + bytes(512))
    return image


@pytest.fixture(scope="session")
def guest():
    """The built-in guest: its config with kernel and initramfs, for tests that talk to a driver."""
    from pytest_chvm import Settings, VmConfig
    from pytest_chvm.machine.guest_choice import choose_guest

    return choose_guest(VmConfig(), Settings.resolve()).config


@pytest.fixture
def needs_taps():
    reason = why_no_taps()
    if reason:
        pytest.skip(f"no TAP can be made here: {reason}")


@pytest.fixture
def needs_root():
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")


@pytest.fixture
def tap_name(needs_taps):
    """The name of a TAP that nobody has; removed afterwards should the test leave it."""
    name = f"ct{uuid.uuid4().hex[:8]}"
    yield name
    subprocess.run(["ip", "link", "del", name], capture_output=True, check=False)


@pytest.fixture
def netns(needs_taps):
    """A network namespace of the test's."""
    name = f"chvmtest-{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.fixture
def small_disk(needs_root, tmp_path):
    """A mounted file system of 1 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "small", directory], check=True)
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


@pytest.fixture
def stranger():
    """A live process that is no VMM."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.send_signal(signal.SIGKILL)


@pytest.fixture
def pool():
    """A pool of subnets that no other test worker of the machine has."""
    for number in itertools.count():
        assert number < 55 * 64, "each pool is taken"
        with socket.socket(socket.AF_UNIX) as taken:
            try:
                # A name that is nobody's once this process is gone.
                taken.bind(f"\0chvm-test-pool-{number}")
            except OSError:
                continue
            yield f"10.{200 + number // 64}.{number % 64 * 4}.0/22"
            return


def reachable(address, timeout_s=AT_ONCE_S):
    """Return what an HTTP server says at an address, over a connection of its own."""
    with socket.create_connection(address, timeout=timeout_s) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = b""
        while data := connection.recv(65536):
            answer += data
    return answer


@pytest.fixture
def http_get():
    return reachable


def frozen(pid):
    states = set()
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/stat") as stat:
            states.add(stat.read().rpartition(")")[2].split()[0])
    return states == {"T"}


@pytest.fixture
def freeze():
    """Stop a process with all of its threads, so that it does not get as far as SIGTERM."""

    def stop(pid):
        os.kill(pid, signal.SIGSTOP)
        deadline = Deadline.after(AT_ONCE_S)
        # Not our child: there is no event to wait for.
        while not frozen(pid):
            assert not deadline.expired

    return stop


@pytest.fixture
def wait_ended():
    """Wait for the end of a process, for at most some seconds; tells whether it came."""

    def wait(pid, timeout_s=5.0):
        from pytest_chvm.host.keeper.remains import pidfd_ended

        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        try:
            return pidfd_ended(fd, timeout_s)
        finally:
            os.close(fd)

    return wait


def kept():
    """What this process's keeper has: its children, its leases, and the locks and sockets held here."""
    mine = default_host().keeper()
    with mine._lock:
        # It starts while its owner goes on, and one of its processes may not be there yet.
        if mine._is_starting:
            mine._wait_started()
    children = set()
    # The keeper is two processes.
    for pid in read_pairs(str(mine.directory / "lock")):
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            # One that is a zombie has ended, and is about to be reaped.
            children |= {f"process {child}" for child in file.read().split() if start_time_ticks(int(child)) is not None}
    leases = {f"lease {path}" for path in mine.directory.iterdir() if path.is_dir()}
    descriptors = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        # The rest is pytest's, and files that a garbage collection closes.
        if re.search(r"pytest-chvm|/dev/net/tun|inotify|pidfd|socket:", target):
            descriptors.add(f"descriptor {fd}: {target}")
    return children | leases | descriptors


@pytest.fixture
def nothing_left():
    """Fails a test after which a process, lease, lock, socket or watch is there that was not before."""
    before = kept()
    yield
    left = kept() - before
    assert not left, f"left behind: {sorted(left)}"


@pytest.fixture
def ctrl_c_interrupts():
    """SIGINT raises KeyboardInterrupt here, also where these tests were started by a shell that has it ignored (`make test &`)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def link_exists():
    return lambda name: interface_exists(name, None)

"""What a test does in a guest: commands, processes, files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_chvm.base.steps import Step
from pytest_chvm.errors import InvalidConfigError
from pytest_chvm.guest.commands import place_of, shown
from pytest_chvm.machine.events import COMMAND, GET, POPEN, PUT, WAIT
from pytest_chvm.machine.machine import RUN_TIMEOUT_S, Machine
from pytest_chvm.machine.ports import Ports
from pytest_chvm.model import CommandResult, as_path

# What only some tests use is imported by them: each process that starts a VM would wait for it.
if TYPE_CHECKING:
    from pytest_chvm.guest.carried import Carry
    from pytest_chvm.guest.files import Run
    from pytest_chvm.machine.carrier import Carrier
    from pytest_chvm.machine.kernel import GuestKernel
    from pytest_chvm.machine.process import GuestProcess
    from pytest_chvm.machine.ssh import Ssh
    from pytest_chvm.model.kernel_log import KernelMessage


class GuestCommands:
    """The part of `Vm` that works in the guest."""

    _machine: Machine
    _ports: Ports

    @cached_property
    def _carrier(self) -> Carrier:
        from pytest_chvm.machine.carrier import Carrier

        return Carrier(self._machine, self._ports.address)

    @cached_property
    def _ssh(self) -> Ssh:
        from pytest_chvm.machine.ssh import Ssh

        return Ssh(self._machine, self._ports.address)

    def run(
        self,
        command: str | Sequence[str],
        *,
        timeout: float | None = RUN_TIMEOUT_S,
        input: str | bytes | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> CommandResult:
        """Run a command in the guest and return what it did: a `str` goes to `sh`, a sequence is one program's arguments.

        It runs in the directory `cwd` of the guest's, with the variables `env` beside those of the guest's environment, as the user
        of that name, whose HOME, USER and LOGNAME it has; without them as the guest's console shell does: root, mostly.
        Several threads may do so at once. `timeout` is seconds (None, 0 or infinity: no limit); CommandTimeoutError after it, when
        the command and all that it started in the guest are killed.
        Raises GuestCommandError where there is no such directory or user, another GuestError or HypervisorError at once when the
        guest dies meanwhile, VmIOError where no shell answers.
        """
        place = place_of(cwd, env, user)
        with self._machine.log.timed(COMMAND, command=str(command), returncode=None) as outcome:
            done = self._machine.run(command, timeout=timeout, input=_bytes(input), place=place)
            outcome["returncode"] = done.returncode
        return done

    def check_output(
        self,
        command: str | Sequence[str],
        *,
        timeout: float | None = RUN_TIMEOUT_S,
        input: str | bytes | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> str:
        """Run a command that must succeed and return its standard output; raises GuestCommandError with both outputs."""
        done = self.run(command, timeout=timeout, input=input, cwd=cwd, env=env, user=user)
        self._machine.check_succeeded(done)
        return done.stdout

    def run_host_binary(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        timeout: float | None = RUN_TIMEOUT_S,
        input: str | bytes | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> CommandResult:
        """Run a program of the host's in the built-in guest, which gets it and the libraries that it loads (`ldd`) first.

        `command` has its path, or its name on the host's PATH, and its arguments; the rest is as of `run`. Files that it reads and
        plugins that it loads have to be put there too, or are there with `root="host"`. Raises InvalidConfigError where
        there is no such program, UnsupportedError for an image, and what `run` and `put` do.
        """
        from pytest_chvm.guest.host_binary import host_binary
        from pytest_chvm.machine import host_binaries

        if isinstance(command, str | bytes) or not command:
            raise InvalidConfigError(f"command {command!r}: expected a list of one program's arguments")
        arguments = [os.fsdecode(word) for word in command]
        if self._machine.guest.has_host_files:
            return self.run(arguments, timeout=timeout, input=input, cwd=cwd, env=env, user=user)
        binary = host_binary(arguments[0])
        host_binaries.bring(self._machine, binary, lambda source, place: self.put(source, place))
        given = {**({"LD_LIBRARY_PATH": binary.library_path} if binary.libraries else {}), **(env or {})}
        return self.run([binary.place, *arguments[1:]], timeout=timeout, input=input, cwd=cwd, env=given, user=user)

    def popen(
        self,
        command: str | Sequence[str],
        *,
        input: str | bytes | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> GuestProcess:
        """Start a process in the guest that runs while the test goes on, and return it once it runs; it ends with the VM.

        The arguments are those of `run`, which raises the same. Several may run at once, and other commands beside them.
        """
        from pytest_chvm.machine.process import GuestProcess

        place = place_of(cwd, env, user)
        with self._machine.log.timed(POPEN, command=str(command)):
            process = self._machine.popen(command, input=_bytes(input), place=place)
        return GuestProcess(self._machine, process, shown(command))

    def wait_until(
        self,
        command: str | Sequence[str],
        timeout: float | None = RUN_TIMEOUT_S,
        *,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> CommandResult:
        """Have the guest run a command until it returns 0, again and again; returns what it did then. Arguments are as of `run`.

        `timeout` is seconds for all of it (None, 0 or infinity: no limit); CommandTimeoutError after it, with the status and the
        outputs of the last attempt. Raises what has become of the guest at once when it dies.
        """
        from pytest_chvm.machine import waits

        with self._machine.log.timed(WAIT, what=str(command)):
            return waits.wait_until(self._machine, command, timeout, place_of(cwd, env, user))

    def wait_for_port(self, port: int, timeout: float | None = RUN_TIMEOUT_S) -> None:
        """Block until something in the guest listens at a TCP port, at whatever of its addresses; nothing connects to it.

        `timeout` as of `wait_until`; the CommandTimeoutError names the ports at which something listens.
        """
        from pytest_chvm.machine import waits

        with self._machine.log.timed(WAIT, what=f"TCP port {port}"):
            waits.wait_for_port(self._machine, port, timeout)

    def wait_for_file(self, path: str | os.PathLike[str], timeout: float | None = RUN_TIMEOUT_S) -> None:
        """Block until a file, a directory or whatever else of that name is in the guest.

        `timeout` as of `wait_until`; the CommandTimeoutError shows the nearest directory that is there, and what is in it.
        """
        from pytest_chvm.machine import waits

        with self._machine.log.timed(WAIT, what=f"file {path}"):
            waits.wait_for_file(self._machine, path, timeout)

    def wait_for_unit(self, unit: str, timeout: float | None = RUN_TIMEOUT_S) -> None:
        """Block until a unit of the guest's systemd is active, or, of type oneshot, has done its work.

        `timeout` as of `wait_until`. The CommandTimeoutError shows the unit's status and journal, and so does the GuestCommandError
        that is raised at once for a unit that has failed or that is not known. UnsupportedError in a guest without systemd.
        """
        from pytest_chvm.machine import waits

        with self._machine.log.timed(WAIT, what=f"unit {unit}"):
            waits.wait_for_unit(self._machine, unit, timeout)

    def read_bytes(self, path: str | os.PathLike[str], *, timeout: float | None = RUN_TIMEOUT_S) -> bytes:
        """Return what is in a file of the guest's, of /proc and the like too, up to 256 MiB.

        Raises VmIOError, an OSError, where it cannot be read. A large file is faster with `get`.
        """
        from pytest_chvm.guest import files

        name = os.fspath(path)
        with self._machine.log.timed(GET, source=name, destination=None):
            return files.read(self._runner(timeout), name)

    def read_text(self, path: str | os.PathLike[str], *, timeout: float | None = RUN_TIMEOUT_S) -> str:
        """Return what is in a file of the guest's as UTF-8, undecodable bytes by `surrogateescape`; see `read_bytes`."""
        return self.read_bytes(path, timeout=timeout).decode(errors="surrogateescape")

    def write_bytes(self, path: str | os.PathLike[str], data: bytes, *, timeout: float | None = RUN_TIMEOUT_S) -> None:
        """Write a file of the guest's, which is made if it is not there, in place: one of /proc or /sys too.

        Directories above it are not made. Raises VmIOError, an OSError, where it cannot be written; a file that it has made is
        removed then. A large file is faster with `put`.
        """
        from pytest_chvm.guest import files

        name = os.fspath(path)
        with self._machine.log.timed(PUT, source=None, destination=name):
            files.write(self._runner(timeout), name, data)

    def write_text(self, path: str | os.PathLike[str], text: str, *, timeout: float | None = RUN_TIMEOUT_S) -> None:
        """Write a file of the guest's as UTF-8, lone surrogates as the bytes that they stand for; see `write_bytes`."""
        self.write_bytes(path, text.encode(errors="surrogateescape"), timeout=timeout)

    def _runner(self, timeout: float | None) -> Run:
        return lambda script, data: self._machine.run(script, input=data, timeout=timeout)

    def ssh_command(self, *arguments: str) -> list[str]:
        """Return the arguments of a program (`subprocess.run`) that logs in as the guest's root over SSH, in each network mode.

        `arguments`: nothing for a login, one line for the guest's shell, several for one program; or, where the first begins with
        "-", options of ssh(1), as they are. Raises UnsupportedError where the guest has no sshd that root can log into.
        """
        return self._ssh.command(*arguments)

    def _closing_ssh(self) -> list[Step]:
        """Return the steps that end what `ssh_command` has started."""
        return [*self._ssh.closing()] if "_ssh" in self.__dict__ else []

    def put(self, src: str | os.PathLike[str], dst: str, *, timeout: float | None = RUN_TIMEOUT_S, xattrs: bool = False) -> None:
        """Copy a file or directory of the host's into the guest; see `pytest_chvm.guest.files.put`.

        `timeout`: CommandTimeoutError after so many seconds without progress (None: no limit). `xattrs`: with extended attributes.
        """
        from pytest_chvm.guest import files

        with self._machine.log.timed(PUT, source=os.fspath(src), destination=os.fspath(dst)):
            files.put(self._runner(timeout), Path(src), os.fspath(dst), carry=self._carry(timeout), xattrs=xattrs)

    def get(self, src: str, dst: str | os.PathLike[str], *, timeout: float | None = RUN_TIMEOUT_S, xattrs: bool = False) -> Path:
        """Copy a file or directory of the guest's to the host and return its path there; see `pytest_chvm.guest.fetch.get`.

        `timeout`: CommandTimeoutError after so many seconds without progress (None: no limit). `xattrs`: with extended attributes.
        """
        from pytest_chvm.guest import fetch

        with self._machine.log.timed(GET, source=os.fspath(src), destination=os.fspath(dst)):
            return fetch.get(self._runner(timeout), os.fspath(src), Path(dst), carry=self._carry(timeout), xattrs=xattrs)

    def _carry(self, timeout: float | None) -> Carry:
        return lambda script: self._carrier.open(script, timeout)

    @property
    def kernel(self) -> GuestKernel:
        """The kernel that the guest runs: its release, version and configuration."""
        from pytest_chvm.machine.kernel import GuestKernel

        return GuestKernel(self._machine)

    def load_module(self, path: str | os.PathLike[str], **parameters: object) -> str:
        """Load a kernel module of the host's (`.ko`, also compressed) into the guest, after those it needs; returns its name.

        `parameters` are the module's, as insmod takes them: True and False are 1 and 0, a list is several values. Modules that come
        with the guest's kernel are there already: `modules=`, or `modprobe` in the guest. Raises InvalidConfigError where it is no
        module, or one for another kernel release, and GuestCommandError with what the kernel says where that does not take it.
        """
        from pytest_chvm.machine import modules

        return modules.load(self._machine, as_path("path", path), parameters, self.write_bytes)

    def dmesg(self) -> list[KernelMessage]:
        """Return the messages in the log of the guest's kernel, in order, those of its boot too.

        Raises GuestCommandError where the guest has no `dmesg`.
        """
        return self._machine.dmesg()

    def collect_gcov(self, directory: str | os.PathLike[str]) -> Path:
        """Bring what a kernel with CONFIG_GCOV_KERNEL has counted so far into a directory of the host's; returns its path.

        Below it the files (`.gcda`) lie by the paths of the tree that the kernel was built in, as gcov(1) and lcov(1) take them,
        beside links to that tree's `.gcno` where it is on this host; earlier ones are replaced. Raises UnsupportedError where the
        kernel counts nothing, and what `get` does.
        """
        from pytest_chvm.machine import gcov

        target = as_path("directory", directory)
        gcov.collect(self._machine, target, lambda source, place: self.get(source, place))
        return target


def _bytes(text: str | bytes | None) -> bytes | None:
    return text.encode(errors="surrogateescape") if isinstance(text, str) else text

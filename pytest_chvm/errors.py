"""The exceptions of pytest-chvm.

Every message says what happened, what was expected and what to do next. Nothing is decided here.
"""

from __future__ import annotations


class VmError(Exception):
    """Base of all errors of this package.

    `vm_name` is the name of the VM it is about, or None where there is none yet.
    """

    def __init__(self, message: str, *, vm_name: str | None = None) -> None:
        super().__init__(message)
        self.vm_name = vm_name


class InvalidConfigError(VmError, ValueError):
    """What was asked for cannot be, on any machine: a bad argument, option or file; nothing was started or done for it."""


class MissingRequirementError(InvalidConfigError):
    """The machine lacks a program, a kernel or a permission; `--chvm-missing=skip` skips the test then."""


class UnsupportedError(VmError):
    """This VMM, guest or network mode cannot do what was asked."""


class HostError(VmError):
    """This machine refused what a VM needs: a full disk, no TAP from the kernel, a lock that is held, the keeper is gone."""


class VmNotFoundError(HostError):
    """The handle names no process or run directory."""


class StopFailedError(HostError):
    """The VMM had to be killed, or something of the VM could not be removed."""


class StateFailedError(HostError):
    """The process of a handle is not the VM's: it was not signalled."""


class HypervisorError(VmError):
    """The VMM or a virtiofsd ended, refused a request, or gave an answer that makes no sense."""


class VmIOError(VmError, OSError):
    """A connection to the guest or its VMM failed: the console, a file that was put or got, a socket."""

    def __init__(self, message: str, *, vm_name: str | None = None) -> None:
        VmError.__init__(self, message, vm_name=vm_name)


class BootFailedError(VmError):
    """The guest did not become ready."""


class GuestError(VmError):
    """The guest did something that the test did not ask for, or a command in it failed."""


class GuestPanicError(GuestError):
    """The guest's kernel panicked."""


class EarlyGuestPanicError(BootFailedError, GuestPanicError):
    """The guest's kernel panicked before the guest was ready: a failed boot, too."""


class GuestRebootError(GuestError):
    """The guest rebooted without being asked to."""


class GuestShutdownError(GuestError):
    """The guest powered itself off without being asked to."""


class GuestSplatError(GuestError):
    """The guest's kernel has reported that something is wrong with it, and went on; the message has the whole report."""


class GuestOopsError(GuestSplatError):
    """The guest's kernel had an oops and went on."""


class GuestCommandError(GuestError):
    """A command in the guest returned non-zero; the message shows both of its outputs.

    `returncode` is its exit status, None where it has none; `stdout` and `stderr` are what it had printed, undecodable bytes by
    `surrogateescape`.
    """

    def __init__(
        self,
        message: str,
        *,
        vm_name: str | None = None,
        returncode: int | None = None,
        stdout: str = "",
        stderr: str = "",
    ) -> None:
        super().__init__(message, vm_name=vm_name)
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr


class CommandTimeoutError(GuestCommandError, TimeoutError):
    """A command in the guest passed its deadline; where `run` waited for it, it and all it started were killed."""

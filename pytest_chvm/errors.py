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
    """What was asked for cannot be: raised before anything is started."""


class MissingRequirementError(InvalidConfigError):
    """The machine lacks a program, a kernel or a permission; `--chvm-missing=skip` skips the test then."""


class BootFailedError(VmError):
    """The VMM or the guest did not get as far as ready."""


class VmNotFoundError(VmError):
    """The handle names no process."""


class StopFailedError(VmError):
    """The VMM had to be killed, or something of the VM could not be removed."""


class StateFailedError(VmError):
    """The process of a handle is not the VM's: it was not signalled."""


class HypervisorError(VmError):
    """The VMM refused a request, or gave an answer that makes no sense."""


class GuestRebootError(HypervisorError):
    """The guest rebooted without being asked to."""


class GuestShutdownError(HypervisorError):
    """The guest powered itself off."""


class GuestOopsError(VmError):
    """The guest's kernel had an oops and went on."""


class VmIOError(VmError, OSError):
    """Talking to the guest failed: the console, a file, a socket."""

    def __init__(self, message: str, *, vm_name: str | None = None) -> None:
        VmError.__init__(self, message, vm_name=vm_name)


class UnsupportedError(VmError):
    """This VMM, guest or network mode cannot do what was asked."""


class GuestCommandError(VmError):
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
    """A command in the guest passed its deadline; it and all it started were killed."""


class GuestPanicError(BootFailedError):
    """The guest's kernel panicked, before ready or after."""

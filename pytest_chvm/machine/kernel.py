"""`GuestKernel`: the kernel that a guest runs."""

from __future__ import annotations

from pytest_chvm.errors import UnsupportedError, VmError
from pytest_chvm.guest.kernels.config import KernelConfig, config_of, unpacked_config
from pytest_chvm.guest.kernels.kernel import Kernel, inspect_kernel
from pytest_chvm.machine.machine import Machine


class GuestKernel:
    """The kernel of a VM's guest, as `Vm.kernel` returns it: asked each time, since it may be another one after a reboot."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    @property
    def release(self) -> str:
        """Its release, as `uname -r` says it: "6.1.0-18-amd64"."""
        return self._said("uname -r").strip()

    @property
    def version(self) -> str:
        """Which build of it this is, as `uname -v` says it: "#1 SMP Debian 6.1.76-1 (2024-02-01)"."""
        return self._said("uname -v").strip()

    @property
    def config(self) -> KernelConfig:
        """How it was configured, from `/proc/config.gz`, what belongs to its file on the host, or what its image has in `/boot`.

        Raises UnsupportedError where none of these has it.
        """
        packed = self._machine.run("cat /proc/config.gz 2>/dev/null", input=None).stdout_bytes
        if packed and (text := unpacked_config(packed)):
            return KernelConfig(text)
        if (kernel := self._kernel) is not None and (found := config_of(kernel)) is not None:
            return found
        release = self.release
        script = "r=$(uname -r); cat /boot/config-$r 2>/dev/null || cat /lib/modules/$r/config 2>/dev/null"
        if config := KernelConfig(self._machine.run(script, input=None).stdout):
            return config
        name = self._machine.name
        beside = f", and beside its file {str(kernel.file)!r} is no config-{release}" if kernel is not None else ""
        raise UnsupportedError(
            f"VM {name!r}: how its kernel {release} was configured is not known: the guest has neither /proc/config.gz "
            f"(CONFIG_IKCONFIG_PROC) nor /boot/config-{release}{beside}",
            vm_name=name,
        )

    @property
    def _kernel(self) -> Kernel | None:
        """Its kernel's file on the host; None where that is the image's affair."""
        return kernel_of(self._machine)

    def _said(self, command: str) -> str:
        done = self._machine.run(command, input=None)
        self._machine.check_succeeded(done)
        return done.stdout


def kernel_of(machine: Machine) -> Kernel | None:
    """Return the file on the host of the kernel that a VM boots; None where that is its image's affair."""
    image = machine.guest.config.kernel_image
    return machine.guest.kernel or (inspect_kernel(image) if image is not None else None)


def with_source(machine: Machine, text: str) -> str:
    """Return what a VM's kernel has said with files and lines behind its functions, where its debug information is known."""
    from pytest_chvm.guest.symbols import debug_kernel, decoded

    try:
        kernel = kernel_of(machine)
    except VmError:
        kernel = None
    vmlinux = None if kernel is None else debug_kernel(kernel)
    return text if vmlinux is None else decoded(text, vmlinux)

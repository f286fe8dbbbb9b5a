"""SSH to a guest without a network: each connection gets an sshd of its own, whose input and output go over the VM's shell."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from pytest_chvm.base.deadline import Deadline
from pytest_chvm.base.untouched import random_hex
from pytest_chvm.errors import VmError
from pytest_chvm.guest.channels import Process
from pytest_chvm.host.relay import Relay
from pytest_chvm.machine.machine import Machine

START_TIMEOUT_S = 30.0
WRITE_TIMEOUT_S = 60.0
# No more than the guest's pipe holds, so that writing to it waits for nobody.
PIECE = 1 << 16
# The shell keeps the pipe open for those that write to it one after the other. sshd(8) starts itself again by its full path.
SERVE = """\
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
mkfifo -m 600 {pipe} || exit
exec 3<>{pipe}
"$(command -v sshd)" -i <{pipe} 3>&-
rm {pipe}
"""


class ShellRelay(Relay):
    """Connects each client to an sshd in the guest that serves it alone."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        super().__init__()

    def serve(self, client: socket.socket) -> None:
        """Serve a client by an sshd, until either ends."""
        pipe = f"/run/chvm-ssh.{random_hex(8)}"
        process = self._machine.popen(SERVE.format(pipe=pipe), input=None)
        back = threading.Thread(target=_copy_output, args=(process, client), daemon=True)
        try:
            # Once it greets, its input is there.
            client.sendall(process.read("out", Deadline.after(START_TIMEOUT_S)))
            back.start()
            while data := client.recv(PIECE):
                # Opened for both, as opening it for writing alone would wait for a reader that may be gone.
                self._machine.run(f"[ -p {pipe} ] && cat 1<>{pipe}", input=data, timeout=WRITE_TIMEOUT_S)
        finally:
            try:
                process.kill()
                self._machine.run(["rm", "-f", pipe], input=None)
            finally:
                # Before the client is closed, whose descriptor may be another's then.
                if back.ident:
                    back.join()


def _copy_output(process: Process, client: socket.socket) -> None:
    never = Deadline.after(None)
    with suppress(OSError, VmError):
        while data := process.read("out", never):
            client.sendall(data)
    with suppress(OSError):
        # Wakes the one that waits for the client's next bytes.
        client.shutdown(socket.SHUT_RDWR)

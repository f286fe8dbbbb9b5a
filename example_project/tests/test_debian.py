"""The daemon as it is installed: in a stock Debian, by cloud-init, as a service of systemd's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from logbox import Client

from pytest_chvm import Vm, VmFactory

PORT = 5140
SESSION = Path(__file__).parents[1] / "logbox" / "guest" / "logbox-session"
SOCKET = f"""\
[Socket]
ListenStream={PORT}
Accept=yes

[Install]
WantedBy=sockets.target
"""
SERVICE = """\
[Service]
ExecStart=/usr/local/bin/logbox-session /var/lib/logbox
StandardInput=socket
StateDirectory=logbox
"""


@pytest.fixture(scope="module")
def debian(chvm_vm_factory: VmFactory) -> Vm:
    """A stock image in which cloud-init has installed the daemon; from the second run on a clone of that."""
    image = Path(os.environ.get("LOGBOX_IMAGE", "debian.qcow2"))
    if not image.exists():
        pytest.skip(f"no {image}: make it with 'chvm guest build debian -o {image}', or name another with LOGBOX_IMAGE")
    files = {
        "/usr/local/bin/logbox-session": SESSION.read_text(),
        "/etc/systemd/system/logbox.socket": SOCKET,
        "/etc/systemd/system/logbox@.service": SERVICE,
    }
    return chvm_vm_factory(
        name="debian",
        root_disk=image,
        memory_mb=512,
        # The first boot of all takes a minute where there is no KVM, and several on a busy machine.
        boot_timeout=400,
        user_data={
            "write_files": [{"path": path, "content": text, "permissions": "0755"} for path, text in files.items()],
            "runcmd": ["systemctl enable --now logbox.socket"],
        },
    )


def test_the_service_is_installed_and_answers(debian: Vm) -> None:
    host = debian.testinfra
    assert host.service("logbox.socket").is_running
    assert host.service("logbox.socket").is_enabled
    assert host.socket(f"tcp://{PORT}").is_listening

    with Client(debian.address(PORT)) as client:
        client.send("hello")

    assert host.file("/var/lib/logbox/log").content_string == "hello\n"


def test_an_administrator_logs_in_and_finds_it(debian: Vm) -> None:
    status = subprocess.run(
        debian.ssh_command("systemctl", "is-active", "logbox.socket"), capture_output=True, text=True, check=True
    )

    assert status.stdout == "active\n"

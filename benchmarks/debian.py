"""How long a big guest takes, booted and cloned: Debian 12 with systemd, sshd and cloud-init, on a root disk.

    python benchmarks/debian.py [--rounds 3] [--json build/debian.json]

The image is made at the first run, in `build/debian`: by mmdebstrap, as root, from the machine's own package sources.
In each round, with QEMU:

    cold        `launch(boot="cold")` to its first command's answer
    clone       `launch(boot="clone")` to its first command's answer
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import boot

from pytest_chvm import launch

# What the project promises.
LIMIT = 1 / 30
PACKAGES = "systemd-sysv,udev,dbus,openssh-server,cloud-init,linux-image-cloud-amd64,initramfs-tools,iproute2"
SIZE = "3G"
CMDLINE = "console=ttyS0 quiet root=/dev/vda rw ds=nocloud net.ifnames=0"
# The machine is up when both are.
CHECK = "systemctl is-active ssh cloud-final"
UP = "active\nactive\n"

# What an image of one's own has to do: configure its network as it is told, say when it is up, and serve a shell.
FILES = {
    "usr/local/sbin/chvm-ready": """\
#!/bin/sh
ip=127.0.0.1
for word in $(cat /proc/cmdline); do
    case $word in
    chvm.ip=*) ip=${word#*=} ;;
    chvm.net=*)
        IFS=,
        set -- ${word#*=}
        unset IFS
        [ "$2" ] && ip addr add $2 dev $1
        ip link set $1 up
        [ "$3" ] && ip route add default via $3
        ;;
    esac
done
echo "CHVM_READY $ip" >/dev/ttyS0
""",
    "etc/systemd/system/chvm-ready.service": """\
[Unit]
Description=Tells the host that this machine is up
After=cloud-final.service ssh.service

[Service]
Type=oneshot
ExecStart=/usr/local/sbin/chvm-ready
""",
    "etc/systemd/system/chvm-shell.service": """\
[Unit]
Description=A shell for the host

[Service]
ExecStart=/bin/sh -c 'exec sh </dev/hvc0 >/dev/hvc0 2>&1'
Restart=always
""",
    "etc/cloud/cloud.cfg.d/90-network.cfg": "network: {config: disabled}\n",
    "var/lib/cloud/seed/nocloud/meta-data": "instance-id: benchmark\n",
    "var/lib/cloud/seed/nocloud/user-data": "#cloud-config\nwrite_files: [{path: /root/seeded, content: seeded}]\n",
    "etc/machine-id": "",
}
LINKS = {
    "etc/systemd/system/cloud-init.target.wants/chvm-ready.service": "../chvm-ready.service",
    "etc/systemd/system/multi-user.target.wants/chvm-shell.service": "../chvm-shell.service",
    # systemd would have a login there.
    "etc/systemd/system/serial-getty@hvc0.service": "/dev/null",
}


def build(directory: Path) -> None:
    """Make the image, its kernel and its initramfs in a directory, unless they are there."""
    if (directory / "disk.img").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as name:
        tree = Path(name) / "tree"
        subprocess.run(["mmdebstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", tree], check=True)
        for path, text in FILES.items():
            file = tree / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (tree / "usr/local/sbin/chvm-ready").chmod(0o755)
        for path, target in LINKS.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).symlink_to(target)
        for kind, file_name in (("vmlinuz", "vmlinuz"), ("initrd.img", "initrd.img")):
            [file] = (tree / "boot").glob(f"{kind}-*")
            shutil.copy(file, directory / file_name)
        image = Path(name) / "disk.img"
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, image, SIZE], check=True)
        # At last: it stands for all of them.
        image.rename(directory / "disk.img")


def measure(directory: Path, how: str, measured: boot.Measurements) -> None:
    """Start the machine, have it answer, and end it."""
    files: dict[str, Any] = {"kernel": directory / "vmlinuz", "initramfs": directory / "initrd.img"}
    started = time.perf_counter()
    with launch(
        vmm="qemu", boot=how, root_disk=directory / "disk.img", cmdline=CMDLINE, memory_mb=1024, boot_timeout=600, **files
    ) as vm:
        ready = time.perf_counter()
        assert vm.check_output("true") == ""
        measured.add(f"{how} to ready", ready - started)
        measured.add(how, time.perf_counter() - started)
        assert vm.check_output(CHECK) == UP
        assert vm.check_output("cat /root/seeded") == "seeded"


def main() -> int:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each kind (default: 3)")
    parser.add_argument("--image", type=Path, default=Path("build/debian"), metavar="DIR", help="default: build/debian")
    parser.add_argument("--json", type=Path, default=Path("build/debian.json"), metavar="PATH", help="default: build/debian.json")
    options = parser.parse_args()
    build(options.image)
    # Not counted: it makes the template.
    started = time.perf_counter()
    measure(options.image, "clone", boot.Measurements())
    print(f"the template and its first clone: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    measured = boot.Measurements()
    for number in range(options.rounds):
        for how in ("cold", "clone") if number % 2 else ("clone", "cold"):
            measure(options.image, how, measured)
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    for what, values in measured.seconds.items():
        print(f"{what:<20}" + "".join(f"{value:>9.2f} s" for value in sorted(values)))
    cold, clone = measured.median("cold"), measured.median("clone")
    assert cold is not None
    assert clone is not None
    print(f"clone / cold: 1/{cold / clone:.1f} ({clone / cold:.4f}; limit 1/{1 / LIMIT:.0f})")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"seconds": measured.seconds, "figures": {"clone / cold": clone / cold}}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

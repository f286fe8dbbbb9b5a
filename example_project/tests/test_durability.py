"""What is acknowledged is safe: on a file system of its own, through a power cut."""

from __future__ import annotations

from collections.abc import Callable

from logbox import Client

from pytest_chvm import Vm

PORT = 5140


def test_a_line_from_the_host_is_on_the_volume(boot_box: Callable[[], Vm]) -> None:
    box = boot_box()
    with Client(box.address(PORT)) as client:
        client.send("hello from the host")

    assert box.check_output("cat /data/log") == "hello from the host\n"
    assert "/dev/vda /data ext2 rw" in box.check_output("cat /proc/mounts")


def test_acknowledged_lines_survive_a_power_cut(boot_box: Callable[[], Vm]) -> None:
    box = boot_box()
    lines = [f"line {number}" for number in range(20)]
    with Client(box.address(PORT)) as client:
        for line in lines:
            client.send(line)
        box.kill()

    assert boot_box().check_output("cat /data/log").splitlines() == lines

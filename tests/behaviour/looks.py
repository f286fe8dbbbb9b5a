"""What a kernel test could look at in a guest, for comparing a clone with a VM that was booted."""

import re

# Of a booted VM, a second after its start, the clock source is another one: `chvm_settle` waits for what a template has waited for.
SCRIPT = r"""
. /lib/chvm/configure.sh; chvm_settle
show() { echo "=== $1"; shift; "$@" 2>&1; }
clocks() { cut -d' ' -f1 /proc/uptime; adjtimex | grep -E 'tv_u?sec'; }
show cmdline cat /proc/cmdline
show boot_id cat /proc/sys/kernel/random/boot_id
show dmi_uuid cat /sys/class/dmi/id/product_uuid
show taint cat /proc/sys/kernel/tainted
show dmesg dmesg -r
show modules cat /proc/modules
show entropy cat /proc/sys/kernel/random/entropy_avail
show tsc cat /proc/cpuinfo
show clocksource cat /sys/devices/system/clocksource/clocksource0/current_clocksource
show perf ls /sys/bus/event_source/devices
show mac cat /sys/class/net/eth0/address
show interrupts cat /proc/interrupts
show btf sh -c 'md5sum /sys/kernel/btf/*'
show devices sh -c 'cat /sys/bus/pci/devices/*/uevent /sys/bus/virtio/devices/*/uevent'
show kaslr grep -w _text /proc/kallsyms
show clocks clocks
sleep 1
show clocks_later clocks
mount -t tmpfs rcu /mnt && umount /mnt && show rcu echo passed
"""
# What a kernel says that has seen time jump, or itself stand still.
COMPLAINTS = re.compile(r"stall|lockup|unstable|skew|time jumped|hung|blocked for", re.IGNORECASE)


def look(vm):
    """Return what a guest shows of itself, by the words of `clone_must_have`, as text without what differs from boot to boot."""
    said = vm.check_output(SCRIPT)
    shown = dict(part.split("\n", 1) for part in said.split("=== ")[1:])
    shown["cmdline"] = " ".join(word for word in shown["cmdline"].split() if not word.startswith("chvm."))
    shown["dmesg"] = [line.partition("] ")[2] for line in shown["dmesg"].splitlines()]
    # Of a module its size and who needs it, not how often.
    shown["modules"] = sorted((line.split()[:2], line.split()[3]) for line in shown["modules"].splitlines())
    shown["interrupts"] = re.sub(r" +\d+(?= )", "", shown["interrupts"])
    # Measured by each boot.
    shown["tsc"] = re.sub(r"(cpu MHz|bogomips)\s*: .*", "", shown["tsc"])
    for key in ("clocks", "clocks_later"):
        uptime_s, seconds, microseconds = re.findall(r"[\d.]+$", shown[key], re.M)
        shown[key] = float(uptime_s), int(seconds) + int(microseconds) / 1e6
    return shown

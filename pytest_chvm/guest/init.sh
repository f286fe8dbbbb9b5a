#!/bin/sh
# The built-in guest's first process: it makes the machine usable, says so on the serial console, and
# then stays as the parent of whatever a test leaves behind. What it is told comes by the kernel command line.
# Of a BusyBox that the host cannot run, nobody knows the names.
[ -e /bin/mount ] || /bin/busybox --install -s
export PATH=/sbin:/bin:/usr/sbin:/usr/bin HOME=/root TERM=dumb
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm
# In one process, as it takes milliseconds of an emulated guest. Not every kernel has all of them.
mount -a -T /lib/chvm/fstab 2>/dev/null
# What the kernel warns of is on its console too, from where the host reads it while it can: also with `quiet`.
read -r level _ </proc/sys/kernel/printk
[ $level -ge 5 ] || echo 5 >/proc/sys/kernel/printk
mount -t cgroup2 cgroup /sys/fs/cgroup 2>/dev/null
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr

while read -r module; do insmod "$module" 2>/dev/null; done </lib/chvm-modules

# Where the root of commands will be another one, it is put together of these; see `chvm_root` of configure.sh.
if [ -e /lib/chvm/root.fstab ]; then
    mkdir -p /host/lower /host/root /host/layer
    mount -t tmpfs -o mode=0755,size=80% layer /host/layer
    mkdir -p /host/layer/upper/etc /host/layer/work /run/lock
    chmod 1777 /run/lock
    touch /lib/chvm/root.ns
    # For the host's bpftool and libbpf; the built-in guest's own programs have no use for it.
    mount -t bpf bpf /sys/fs/bpf 2>/dev/null
    # modprobe looks for the modules of this kernel where the host has those of its own.
    { read -r places && read -r tree; } </lib/chvm/root.modules && mkdir -p "/host/layer/upper$places" &&
        ln -s "$tree" "/host/layer/upper$places"
fi

ifconfig lo 127.0.0.1 up

# A program that is to be there before anybody asks for it.
[ -e /lib/chvm/resident ] && . /lib/chvm/resident

# The shell the host talks to: as a script, since an interactive one would edit lines and prompt.
console_shell() { setsid sh /dev/hvc0 </dev/hvc0 >/dev/hvc0 2>&1; }
shell=
[ -c /dev/hvc0 ] && { console_shell & shell=$!; }

. /lib/chvm/configure.sh
# Words that the kernel's command line had no room for are in a file.
chvm_configure $(cat /proc/cmdline /lib/chvm/words 2>/dev/null)

# Waiting also reaps the orphans that tests leave. A shell that a test ended is started again.
while [ "$shell" ]; do
    wait "$shell"
    console_shell &
    shell=$!
done
while :; do sleep 3600; done

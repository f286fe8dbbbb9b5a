#!/bin/sh
# The lab's first process: puts a writable, throwaway layer over the host's root file system and goes there.
# The kernel command line says, beside what the built-in guest's init takes:
#   chvm.root=TAG             the shared dir with the root file system
#   chvm.exec=PROGRAM,WORD... what becomes process 1 in it, as printf's %b takes it
export PATH=/sbin:/bin:/usr/sbin:/usr/bin
mount -t devtmpfs dev /dev 2>/dev/null
mount -t proc proc /proc
mount -t sysfs sys /sys
exec </dev/null >/dev/ttyS0 2>&1

fail() {
    echo "chvm: $*"
    poweroff -f
    while :; do sleep 3600; done
}

root= program= marker=CHVM_READY name=chvm-lab
for word in $(cat /proc/cmdline); do
    value=${word#*=}
    case $word in
    chvm.root=*) root=$value ;;
    chvm.exec=*) program=$value ;;
    chvm.hostname=*) name=$value ;;
    esac
done

kvm_amd=
while read -r module; do
    case $module in
    */kvm?amd.ko) kvm_amd=$module ;;
    *) insmod "$module" ;;
    esac
done </lib/chvm-modules

mkdir -p /lower /layer /root
mount -t virtiofs -o ro "$root" /lower || fail "cannot mount the root file system"
mount -t tmpfs -o mode=0755,size=80% layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work overlay /root || fail "cannot put a layer over the root"

for place in dev proc sys; do
    mkdir -p /root/$place
    mount --move /$place /root/$place
done
mkdir -p /root/dev/pts /root/dev/shm /root/run
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /root/dev/pts
mount -t tmpfs -o mode=1777 shm /root/dev/shm
mount -t tmpfs -o mode=0755 run /root/run
mount -t cgroup2 cgroup /root/sys/fs/cgroup
mkdir -m 1777 /root/run/lock
# Drivers look for it (host/kvm.py).
: >/root/run/chvm-lab
ln -s /proc/self/fd /root/dev/fd
for number in 0,stdin 1,stdout 2,stderr; do ln -s "/proc/self/fd/${number%,*}" "/root/dev/${number#*,}"; done
ifconfig lo 127.0.0.1 up
hostname "$name"
[ -f /root/etc/hosts ] && echo "127.0.1.1 $name" >>/root/etc/hosts

set --
while [ "$program" ]; do
    case $program in *,*) rest=${program#*,} ;; *) rest= ;; esac
    set -- "$@" "$(printf %b "${program%%,*}")"
    program=$rest
done
# KVM gives its guests the TSC frequency that it finds when kvm_amd is loaded, and the kernel sets its own right once more a second after
# its start. Where the two differ by more than 250 ppm, and there is no TSC scaling, a guest's timers never fire (kvm_set_tsc_khz and
# set_tsc_khz in arch/x86/kvm/x86.c).
tries=0
until dmesg | grep -q 'tsc: Refined' || [ $tries = 100 ]; do tries=$((tries + 1)) && usleep 50000; done
insmod "$kvm_amd"
echo "$marker 127.0.0.1"
exec switch_root /root "$@"

#!/bin/sh
# The built-in guest's first process: it makes the machine usable, says so on the serial console, and
# then stays as the parent of whatever a test leaves behind. The kernel command line says what to do:
#   chvm.net=DEVICE,ADDRESS/PREFIX,GATEWAY   one a NIC (the gateway may be empty)
#   chvm.share=TAG[,ro]                      one a shared dir
#   chvm.ip= chvm.nonce= chvm.marker= chvm.hostname=
export PATH=/sbin:/bin:/usr/sbin:/usr/bin HOME=/root TERM=dumb
mount -t devtmpfs dev /dev 2>/dev/null
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs -o mode=0755,size=40% run /run
mount -t tmpfs shm /dev/shm
mount -t cgroup2 cgroup /sys/fs/cgroup 2>/dev/null

while read -r module; do insmod "$module" 2>/dev/null; done </lib/chvm-modules

console=/dev/console
for device in /dev/ttyS0 /dev/ttyAMA0; do
    [ -c "$device" ] && console=$device && break
done

ip=127.0.0.1 marker=CHVM_READY nonce=
ifconfig lo 127.0.0.1 up
for word in $(cat /proc/cmdline); do
    value=${word#*=}
    case $word in
    chvm.hostname=*) hostname "$value" ;;
    chvm.ip=*) ip=$value ;;
    chvm.marker=*) marker=$value ;;
    chvm.nonce=*) nonce=$value ;;
    chvm.net=*)
        device=${value%%,*} value=${value#*,}
        ip addr add "${value%%,*}" dev "$device" 2>&1
        ip link set "$device" up
        [ "${value#*,}" ] && ip route add default via "${value#*,}"
        ;;
    chvm.share=*)
        tag=${value%,ro}
        mkdir -p "/mnt/$tag"
        options=rw && [ "$tag" != "$value" ] && options=ro
        mount -t virtiofs -o $options "$tag" "/mnt/$tag" || echo "chvm: cannot mount shared dir $tag"
        ;;
    esac
done >"$console" 2>&1

# The shell the host talks to: as a script, since an interactive one would edit lines and prompt.
console_shell() { setsid sh /dev/hvc0 </dev/hvc0 >/dev/hvc0 2>&1; }
shell=
[ -c /dev/hvc0 ] && { console_shell & shell=$!; }

echo "$marker $ip${nonce:+ nonce=$nonce}" >"$console"

# Waiting also reaps the orphans that tests leave. A shell that a test ended is started again.
while [ "$shell" ]; do
    wait "$shell"
    console_shell &
    shell=$!
done
while :; do sleep 3600; done

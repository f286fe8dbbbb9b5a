#!/bin/sh
# The first process of a stock image's guest: finds the image's root, puts what the host needs into its /run, and goes there.
# Nothing of the image is needed for that, and nothing of it is changed. /lib/chvm/root says where the root is: DEVICE TYPE OPTIONS.
[ -e /bin/mount ] || /bin/busybox --install -s
export PATH=/sbin:/bin:/usr/sbin:/usr/bin
mount -t devtmpfs dev /dev 2>/dev/null
mount -t proc proc /proc
mount -t sysfs sys /sys
exec </dev/null >/dev/console 2>&1

fail() {
    echo "chvm: $*"
    poweroff -f
    while :; do sleep 3600; done
}

while read -r module; do insmod "$module" 2>/dev/null; done </lib/chvm-modules
read -r device type options </lib/chvm/root
tries=0
until [ -b /dev/$device ]; do
    tries=$((tries + 1))
    [ $tries = 1000 ] && fail "the root disk has no $device: is the kernel's virtio driver missing?"
    usleep 10000
done
mkdir -p /image
mount -t $type -o rw${options:+,$options} /dev/$device /image || mount -t $type -o ro${options:+,$options} /dev/$device /image ||
    fail "the root /dev/$device cannot be mounted as $type"

# systemd keeps what is mounted there, and so does OpenRC.
mount -t tmpfs -o mode=0755,nosuid,nodev run /run
mkdir /run/chvm
cp /bin/busybox /lib/chvm/renew /lib/chvm/configure_any.sh /lib/chvm/stock.sh /run/chvm
cat /proc/cmdline /lib/chvm/words >/run/chvm/words 2>/dev/null
init=/sbin/init
for word in $(cat /run/chvm/words); do
    case $word in
    init=*) init=${word#*=} ;;
    esac
done
for place in dev proc sys run; do
    [ -d /image/$place ] || mkdir /image/$place || fail "the root has no /$place"
    mount --move /$place /image/$place
done
in_image() { chroot /image /run/chvm/busybox "$@"; }
for other in $init /usr/lib/systemd/systemd /lib/systemd/systemd /etc/init /bin/init /bin/sh; do
    in_image test -x $other && init=$other && break
done
in_image test -x $init || fail "the root on /dev/$device has no init: none at $init or where it may be"
# As far as its links lead.
case $(in_image readlink -f $init) in
*/systemd)
    units=/image/run/systemd/system
    mkdir -p $units/sysinit.target.wants $units/multi-user.target.wants $units/default.target.wants
    cp /lib/chvm/units/* $units
    for unit in console setup; do ln -s ../chvm-$unit.service $units/sysinit.target.wants; done
    for target in multi-user default; do ln -s ../chvm-ready.service $units/$target.target.wants; done
    ln -s /dev/null $units/serial-getty@hvc0.service
    # Its addresses are those that the host says: nobody else is to ask for others, or to wait for them.
    grep -qw network-config=disabled /image/run/chvm/words && for unit in systemd-networkd.service systemd-networkd.socket \
        systemd-networkd-wait-online.service NetworkManager.service NetworkManager-wait-online.service networking.service \
        ifup@.service ifupdown-wait-online.service dhcpcd.service connman.service wicked.service network.service; do
        ln -s /dev/null $units/$unit
    done
    ;;
*)
    in_image setsid /run/chvm/busybox sh /run/chvm/stock.sh beside_init &
    ;;
esac
# What the kernel took for no word of its own is init's.
exec switch_root /image $init "$@"

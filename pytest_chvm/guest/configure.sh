# What makes the built-in guest the machine that it is to be; read by its init, and by its console shell.
# chvm_configure WORD...: the words are those of the kernel command line, others are passed over:
#   chvm.net=DEVICE,ADDRESS/NETMASK,GATEWAY,MAC   one a NIC (each but the first may be empty)
#   chvm.share=TAG,ro|rw,PLACE                    one a shared dir, the place as printf's %b takes it
#   chvm.root=TAG[,nosuid]                        before those: the shared dir that is to be the root of all commands
#   chvm.modules=disk                             one of the disks, the last, has all modules of this kernel
#   chvm.load=NUMBER,MODULE PARAMETER...          after that: one to load, as printf's %b takes it
#   chvm.disk=DEVICE                              one that must be there
#   chvm.ip= chvm.nonce= chvm.marker= chvm.hostname=
# At last it says on the serial console that the machine is ready, after a line for each thing that it is not: MARKER failed=WHAT.
# Written to fork as little as it can: this is most of what a clone's start takes.
chvm_renew=/lib/chvm/renew
chvm_console=/dev/console
for device in /dev/ttyAMA0 /dev/ttyS0; do
    [ -c $device ] && chvm_console=$device && break
done
chvm_net() {
    local device=$1 address=$2 gateway=$3 mac=$4
    # Down first: a clone's has the saved VM's addresses, and an IPv6 one made of its MAC is made anew only when it goes up.
    ifconfig $device 0.0.0.0 down ${mac:+hw ether $mac} ${address:+${address%/*} netmask ${address#*/} up} || return 1
    [ -z "$gateway" ] || route add default gw $gateway
}
# What was just plugged in takes the kernel a moment, of which no event tells a shell.
chvm_retry() {
    local tries=0
    until "$@" 2>/dev/null; do
        tries=$((tries + 1))
        [ $tries = 500 ] && return 1
        usleep 10000
    done
}
# chvm_mount TAG ro|rw PLACE
chvm_mount() {
    mount -t virtiofs -o $2 $1 "$3" 2>/dev/null && return
    # Where the kernel does not know the file system there is nothing to wait for.
    grep -qw virtiofs /proc/filesystems && chvm_retry mount -t virtiofs -o $2 $1 "$3" && return
    echo "chvm: cannot mount shared dir $1"
    return 1
}
chvm_share() {
    local tag=${1%%,*} place=${1##*,} mode=${1#*,}
    case $place in *\\*) place=$(printf %b "$place") ;; esac
    mkdir -p "$chvm_root$place"
    chvm_mount $tag ${mode%%,*} "$chvm_root$place"
}
# The layer that takes what is written is there already, and gets files of the guest's own before it is a part of the root: the other
# way round takes longer.
chvm_root() {
    local layer=/host/layer/upper name line
    chvm_mount ${1%,*} ro /host/lower || return 1
    read -r line </etc/machine-id
    echo $line >$layer/etc/machine-id
    read -r name </proc/sys/kernel/hostname
    {
        while IFS= read -r line; do echo "$line"; done </host/lower/etc/hosts
        echo "127.0.1.1 $name"
    } >$layer/etc/hosts
    mount -a -T /lib/chvm/root.fstab || return 1
    [ $1 = ${1%,*} ] || mount -o remount,bind,nosuid /host/root || return 1
    chvm_root=/host/root
}
# What runs commands stays where it is, with its own programs; the commands see the other root in a mount namespace, where it is
# not just another directory: a process whose root is one may make no user namespaces.
chvm_enter_root() { unshare --mount=/lib/chvm/root.ns mount -o move $chvm_root /; }
# A kernel that is still to measure its clock would do that in each clone: it does so a second after its boot.
chvm_settle() {
    local source
    read -r source </sys/devices/system/clocksource/clocksource0/current_clocksource
    [ $source != tsc-early ] || timeout 5 grep -qm1 'clocksource: Switched to clocksource tsc$' /dev/kmsg
}
# The disk with all modules of this kernel, where modprobe looks for them. It was put away for another disk, which is waited for.
chvm_show_modules() {
    local place block serial= device count
    read -r place </proc/sys/kernel/osrelease
    place=/lib/modules/$place
    [ ! -e $place/modules.dep ] || return 0
    if { read -r device count </run/chvm-modules; } 2>/dev/null; then
        rm /run/chvm-modules
        chvm_retry chvm_more_disks $count
        echo $device >/sys/bus/virtio/drivers/virtio_blk/bind
    fi
    for block in /sys/block/vd*; do
        # It ends without a newline.
        { read -r serial <$block/serial; } 2>/dev/null
        [ "$serial" = chvm-modules ] && mkdir -p $place && mount -t ext4 -o ro /dev/${block##*/} $place && return
    done
    echo "chvm: the disk with the modules of this kernel cannot be mounted: that needs CONFIG_VIRTIO_BLK and CONFIG_EXT4_FS"
}
chvm_more_disks() {
    set -- $1 /sys/block/vd*
    [ -e $2 ] && [ $# -gt $(($1 + 1)) ]
}
# Before a disk is plugged in, so that this one gets the name that it would have; fails where the modules are in use.
chvm_put_modules_away() {
    local place device block
    read -r place </proc/sys/kernel/osrelease
    while read -r device block _; do
        [ $block != /lib/modules/$place ] || break
    done </proc/mounts
    [ "$block" ] && umount $block || return
    device=$(readlink /sys/block/${device#/dev/}/device)
    device=${device##*/}
    echo $device >/sys/bus/virtio/drivers/virtio_blk/unbind || return
    set -- /sys/block/vd*
    [ -e $1 ] || shift
    echo $device $# >/run/chvm-modules
}
chvm_load() { modprobe $(printf %b "${1#*,}"); }
chvm_configure() {
    local chvm_root= word value ip=127.0.0.1 marker=CHVM_READY nonce= share=0 failed= machine_id level _
    read -r machine_id </proc/sys/kernel/random/uuid
    echo "${machine_id//-/}" >/etc/machine-id
    for word; do
        value=${word#*=}
        case $word in
        chvm.hostname=*) echo "$value" >/proc/sys/kernel/hostname ;;
        chvm.ip=*) ip=$value ;;
        chvm.marker=*) marker=$value ;;
        chvm.nonce=*) nonce=$value ;;
        chvm.net=*) IFS=, && set -- $value && unset IFS && { chvm_net "$@" || failed="$failed nic${1#eth}"; } ;;
        chvm.share=*)
            chvm_share "$value" || failed="$failed share$share"
            share=$((share + 1))
            ;;
        chvm.root=*)
            chvm_root $value || failed="$failed share$share"
            share=$((share + 1))
            ;;
        chvm.modules=*) chvm_show_modules ;;
        chvm.load=*) chvm_load "$value" || failed="$failed module${value%%,*}" ;;
        chvm.disk=*) chvm_retry [ -b $value ] || failed="$failed disk${value#/dev/}" ;;
        esac
    done >$chvm_console 2>&1
    [ -z "$chvm_root" ] || chvm_enter_root || failed="$failed share0"
    [ -c /dev/hvc0 ] || failed="$failed console"
    [ -d /sys/bus/pci/drivers/pvpanic-pci ] || failed="$failed panic"
    # A kernel message in the middle of the line would make it another one.
    read -r level _ </proc/sys/kernel/printk
    echo 1 >/proc/sys/kernel/printk
    for word in $failed; do
        echo "$marker failed=$word${nonce:+ nonce=$nonce}"
    done >$chvm_console
    echo "$marker $ip${nonce:+ nonce=$nonce}" >$chvm_console
    echo $level >/proc/sys/kernel/printk
}

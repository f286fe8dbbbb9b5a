# What the host needs of a guest that is a stock image, beside its init: stock.sh STEP. Everything is in /run/chvm, the tools too.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb
. /run/chvm/configure_any.sh
chvm_words=$(cat /run/chvm/words)

# A shell of root's for the host, the image's own: BusyBox's would run its own tools in place of the image's. As a script, since an
# interactive one would edit lines and prompt.
chvm_sh=/bin/sh
[ -x /bin/sh ] || chvm_sh="/run/chvm/busybox sh"
console() { $chvm_sh /dev/hvc0 </dev/hvc0 >/dev/hvc0 2>&1; }
# Until udev, where there is one, has given a NIC its last name, which it could not once that is up.
named() {
    [ -e /run/udev/control ] || return 0
    tries=0 record=/run/udev/data/n$(cat /sys/class/net/$1/ifindex)
    until [ -e $record ]; do
        tries=$((tries + 1))
        [ $tries = 100 ] && return
        $chvm_busybox usleep 100000
    done
}
setup() {
    ip link set dev lo up
    number=0
    while chvm_nic $number; do
        named $chvm_device
        number=$((number + 1))
    done
    for word in $chvm_words; do
        case $word in
        chvm.net=*) chvm_told_nic ${word#*=} ;;
        chvm.share=*) share ${word#*=} ;;
        esac
    done
}
share() {
    tag=${1%%,*} place=$(printf %b "${1##*,}") options=${1#*,}
    mkdir -p "$place" && mount -t virtiofs -o ${options%%,*} $tag "$place" || echo "chvm: cannot mount shared dir $tag" >$chvm_console
}
# What cloud-init says of itself, if that is an error: its own program takes seconds of an emulated guest to say so.
cloud_init_failed() {
    [ -e /run/cloud-init/result.json ] && tr -d ' \n' </run/cloud-init/result.json | grep -q '"errors":\["'
}
ready() {
    # What the kernel warns of is on its console too, also with `quiet`.
    read -r level _ </proc/sys/kernel/printk
    [ $level -ge 5 ] || echo 5 >/proc/sys/kernel/printk
    failed=
    number=0 shares=0
    for word in $chvm_words; do
        case $word in
        chvm.net=*)
            has_address ${word#*=} || { chvm_told_nic ${word#*=} && has_address ${word#*=}; } || failed="$failed nic$number"
            number=$((number + 1))
            ;;
        chvm.share=*)
            tag=${word#*=}
            grep -q "^${tag%%,*} [^ ]* virtiofs " /proc/mounts || failed="$failed share$shares"
            shares=$((shares + 1))
            ;;
        esac
    done
    if cloud_init_failed; then
        failed="$failed cloud-init"
        { echo "chvm: cloud-init status:" && cloud-init status --long; } >$chvm_console 2>&1
    fi
    [ -d /sys/bus/pci/drivers/pvpanic-pci ] || failed="$failed panic"
    [ -c /dev/hvc0 ] || failed="$failed console"
    chvm_failed=$failed
    chvm_read_words $chvm_words
    chvm_say_ready
}
has_address() {
    old=$IFS IFS=,
    set -- $1
    IFS=$old
    [ -z "$2" ] || { chvm_nic ${1#eth} && ip -o -4 addr show dev $chvm_device | grep -qF " ${2%/*}/"; }
}
# For an init that is not systemd: waits until what it starts at boot has been started. Boot scripts of sysvinit, OpenRC, BusyBox
# and runit are known by their names; once none has run for a while they are through.
beside_init() {
    cd /
    exec </dev/null >$chvm_console 2>&1
    while :; do console; done &
    setup
    quiet=0
    while [ $quiet -lt 5 ]; do
        $chvm_busybox usleep 100000
        quiet=$((quiet + 1))
        for comm in /proc/[0-9]*/comm; do
            read -r name <$comm || continue
            case $name in
            rc | rcS | rc.* | openrc | openrc-run* | S[0-9][0-9]* | switch_root | cloud-init) quiet=0 ;;
            esac
        done 2>/dev/null
        [ -d /run/openrc/rc.starting ] && quiet=0
    done
    for word in $chvm_words; do
        case $word in chvm.hostname=*) echo "${word#*=}" >/proc/sys/kernel/hostname ;; esac
    done
    ready
    wait
}
"$1"

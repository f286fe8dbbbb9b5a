# What makes a clone of an image a machine of its own; read by the sh on its console before it is saved, and by what is put in front
# of a stock image. The words are those of configure.sh. For any POSIX sh, with the `ip` of iproute2 or of BusyBox.
chvm_console=/dev/console
for chvm_device in /dev/ttyAMA0 /dev/ttyS0; do
    [ -c $chvm_device ] && chvm_console=$chvm_device && break
done
# A stock image has our own, and may have no other.
chvm_busybox=
[ -x /run/chvm/busybox ] && chvm_busybox=/run/chvm/busybox && ip() { /run/chvm/busybox ip "$@"; }
# NICs in the order of the machine's, whatever they are called: chvm_nic NUMBER
chvm_nic() {
    for chvm_device in /sys/class/net/*; do
        [ -e $chvm_device/device ] && echo "$(cat $chvm_device/ifindex) ${chvm_device##*/}"
    done | sort -n | sed -n "$(($1 + 1))s/.* //p"
}
# Says why clones could not be given addresses of their own: chvm_check WORD...
chvm_check() {
    [ $# = 0 ] && return
    # The last ones' names are cut at 15 characters.
    chvm_manager=$(cat /proc/[0-9]*/comm 2>/dev/null |
        grep -xm1 -e dhclient -e dhcpcd -e udhcpc -e connmand -e wickedd -e NetworkManager -e systemd-network)
    [ "$chvm_manager" ] && echo "its network is managed by $chvm_manager" && return 1
    for chvm_word; do
        chvm_ifs=$IFS IFS=,
        set -- ${chvm_word#*=}
        IFS=$chvm_ifs
        chvm_device=$(chvm_nic ${1#eth})
        if ! ip -o -4 addr show dev "$chvm_device" | grep -qF " ${2%/*}/"; then
            echo "its NIC number ${1#eth} does not have the address that it was told: ${2%/*}"
            return 1
        fi
    done
}
# Its addresses were the saved VM's.
chvm_net() {
    chvm_device=$(chvm_nic ${1#eth})
    ip link set dev "$chvm_device" down && ip addr flush dev "$chvm_device" || return 1
    if [ "$4" ]; then ip link set dev "$chvm_device" address $4 || return 1; fi
    if [ "$2" ]; then ip addr add $2 dev "$chvm_device" && ip link set dev "$chvm_device" up || return 1; fi
    if [ "$3" ]; then ip route append default via $3 dev "$chvm_device" || return 1; fi
}
chvm_told_nic() {
    chvm_ifs=$IFS IFS=,
    set -- $1
    IFS=$chvm_ifs
    chvm_net "$@" || chvm_failed="$chvm_failed nic${1#eth}"
}
chvm_read_words() {
    chvm_ip=127.0.0.1 chvm_marker=CHVM_READY chvm_nonce= chvm_name=
    for chvm_word; do
        chvm_value=${chvm_word#*=}
        case $chvm_word in
        chvm.ip=*) chvm_ip=$chvm_value ;;
        chvm.marker=*) chvm_marker=$chvm_value ;;
        chvm.nonce=*) chvm_nonce=$chvm_value ;;
        chvm.hostname=*) chvm_name=$chvm_value ;;
        esac
    done
}
# What tells one machine from another, beside its addresses.
chvm_identity() {
    chvm_id=$(tr -d - </proc/sys/kernel/random/uuid)
    for chvm_file in /etc/machine-id /var/lib/dbus/machine-id; do
        [ -w $chvm_file ] && echo $chvm_id >$chvm_file
    done
    if [ "$chvm_name" ] && [ "$(cat /proc/sys/kernel/hostname)" = "$chvm_told_name" ]; then
        echo "$chvm_name" >/proc/sys/kernel/hostname
        [ -w /etc/hostname ] && [ "$(cat /etc/hostname)" = "$chvm_told_name" ] && echo "$chvm_name" >/etc/hostname
        [ -w /etc/hosts ] && sed -i "s/\b$chvm_told_name\b/$chvm_name/g" /etc/hosts
    fi
    chvm_ssh_keys
} 2>/dev/null
# Of the same types as before. One is made at once, and the others while the machine is used: an RSA key takes seconds.
chvm_ssh_keys() {
    set -- /etc/ssh/ssh_host_*_key
    [ -e "$1" ] || return
    rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub
    chvm_types=
    for chvm_file; do
        chvm_type=${chvm_file#*ssh_host_} chvm_type=${chvm_type%_key}
        if [ $chvm_type = ed25519 ]; then chvm_ssh_key $chvm_type; else chvm_types="$chvm_types $chvm_type"; fi
    done
    chvm_reload_ssh
    [ -z "$chvm_types" ] && return
    {
        for chvm_type in $chvm_types; do chvm_ssh_key $chvm_type; done
        chvm_reload_ssh
    } </dev/null >/dev/null 2>&1 &
}
chvm_ssh_key() { ssh-keygen -q -t $1 -N '' -C "root@${chvm_name:-clone}" -f /etc/ssh/ssh_host_$1_key </dev/null >/dev/null; }
chvm_reload_ssh() {
    for chvm_file in /run/sshd.pid /var/run/sshd.pid; do
        [ -e $chvm_file ] && kill -HUP "$(cat $chvm_file)" && return
    done
}
# After a line for each thing that it is not.
chvm_say_ready() {
    # A kernel message in the middle of the line would make it another one.
    read -r chvm_level _ </proc/sys/kernel/printk
    echo 1 >/proc/sys/kernel/printk
    for chvm_word in $chvm_failed; do
        echo "$chvm_marker failed=$chvm_word${chvm_nonce:+ nonce=$chvm_nonce}"
    done >$chvm_console
    echo "$chvm_marker $chvm_ip${chvm_nonce:+ nonce=$chvm_nonce}" >$chvm_console
    echo $chvm_level >/proc/sys/kernel/printk
}
chvm_configure() {
    chvm_failed=
    chvm_read_words "$@"
    chvm_identity
    for chvm_word; do
        case $chvm_word in
        chvm.net=*) chvm_told_nic ${chvm_word#*=} ;;
        esac
    done >$chvm_console 2>&1
    [ -d /sys/bus/pci/drivers/pvpanic-pci ] || chvm_failed="$chvm_failed panic"
    chvm_say_ready
}

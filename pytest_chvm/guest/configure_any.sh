# What makes a clone of an image that is not ours a machine of its own; read by the sh on its console before it is saved.
# The words are those of configure.sh. For any POSIX sh, with the `ip` of iproute2 or of BusyBox.
chvm_console=/dev/console
for chvm_device in /dev/ttyS0 /dev/ttyAMA0; do
    [ -c $chvm_device ] && chvm_console=$chvm_device && break
done
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
chvm_configure() {
    chvm_ip=127.0.0.1 chvm_marker=CHVM_READY chvm_nonce= chvm_failed=
    [ -w /etc/machine-id ] && tr -d - </proc/sys/kernel/random/uuid >/etc/machine-id
    for chvm_word; do
        chvm_value=${chvm_word#*=}
        case $chvm_word in
        chvm.ip=*) chvm_ip=$chvm_value ;;
        chvm.marker=*) chvm_marker=$chvm_value ;;
        chvm.nonce=*) chvm_nonce=$chvm_value ;;
        chvm.net=*)
            chvm_ifs=$IFS IFS=,
            set -- $chvm_value
            IFS=$chvm_ifs
            chvm_net "$@" || chvm_failed="$chvm_failed nic${1#eth}"
            ;;
        esac
    done >$chvm_console 2>&1
    [ -d /sys/bus/pci/drivers/pvpanic-pci ] || chvm_failed="$chvm_failed panic"
    # A kernel message in the middle of the line would make it another one.
    read -r chvm_level _ </proc/sys/kernel/printk
    echo 1 >/proc/sys/kernel/printk
    for chvm_word in $chvm_failed; do
        echo "$chvm_marker failed=$chvm_word nonce=$chvm_nonce"
    done >$chvm_console
    echo "$chvm_marker $chvm_ip nonce=$chvm_nonce" >$chvm_console
    echo $chvm_level >/proc/sys/kernel/printk
}

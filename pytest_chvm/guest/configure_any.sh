# What makes a clone of an image a machine of its own; read by the sh on its console before it is saved, and by what is put in front
# of a stock image. The words are those of configure.sh. For any POSIX sh, with the `ip` of iproute2 or of BusyBox.
chvm_console=/dev/console
for chvm_device in /dev/ttyAMA0 /dev/ttyS0; do
    [ -c $chvm_device ] && chvm_console=$chvm_device && break
done
# A stock image has our own, and may have no other.
chvm_busybox=
[ -x /run/chvm/busybox ] && chvm_busybox=/run/chvm/busybox && ip() { /run/chvm/busybox ip "$@"; }
# Sets chvm_device to the machine's NIC of a number, whatever it is called: chvm_nic NUMBER
chvm_nic() {
    for chvm_path in /sys/class/net/*; do
        [ -e $chvm_path/device ] && read -r chvm_index <$chvm_path/ifindex || continue
        chvm_before=0
        for chvm_other in /sys/class/net/*; do
            [ -e $chvm_other/device ] && read -r chvm_other <$chvm_other/ifindex &&
                [ $chvm_other -lt $chvm_index ] && chvm_before=$((chvm_before + 1))
        done
        [ $chvm_before = $1 ] && chvm_device=${chvm_path##*/} && return
    done
    chvm_device=
    return 1
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
        chvm_nic ${1#eth}
        if ! ip -o -4 addr show dev "$chvm_device" | grep -qF " ${2%/*}/"; then
            echo "its NIC number ${1#eth} does not have the address that it was told: ${2%/*}"
            return 1
        fi
    done
}
# Its addresses were the saved VM's.
chvm_net() {
    chvm_nic ${1#eth} || return
    if [ "$chvm_busybox" ]; then
        # In one go, and with a program that starts fast.
        $chvm_busybox ifconfig $chvm_device 0.0.0.0 down ${4:+hw ether $4} ${2:+${2%/*} netmask ${2#*/} up} || return
        [ -z "$3" ] || $chvm_busybox route add default gw $3 $chvm_device
        return
    fi
    ip link set dev "$chvm_device" down && ip addr flush dev "$chvm_device" || return
    if [ "$4" ]; then ip link set dev "$chvm_device" address $4 || return; fi
    if [ "$2" ]; then ip addr add $2 dev "$chvm_device" && ip link set dev "$chvm_device" up || return; fi
    if [ "$3" ]; then ip route append default via $3 dev "$chvm_device"; fi
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
# What tells one machine from another, beside its addresses. Of the shell's own means where that can be: in a clone each program
# is one that an emulated processor runs for the first time.
chvm_identity() {
    chvm_ifs=$IFS
    read -r chvm_uuid </proc/sys/kernel/random/uuid
    IFS=-
    set -- $chvm_uuid
    IFS=$chvm_ifs
    chvm_id=$1$2$3$4$5 chvm_old_id=
    [ -r /etc/machine-id ] && read -r chvm_old_id </etc/machine-id
    for chvm_file in /etc/machine-id /var/lib/dbus/machine-id; do
        [ -w $chvm_file ] && echo $chvm_id >$chvm_file
    done
    # Where journalctl looks for what journald goes on writing.
    for chvm_file in /run/log/journal /var/log/journal; do
        [ "$chvm_old_id" ] && [ -d $chvm_file/$chvm_old_id ] && $chvm_busybox ln -s $chvm_old_id $chvm_file/$chvm_id
    done
    read -r chvm_file </proc/sys/kernel/hostname
    if [ "$chvm_name" ] && [ "$chvm_file" = "$chvm_told_name" ]; then
        echo "$chvm_name" >/proc/sys/kernel/hostname
        [ -w /etc/hostname ] && read -r chvm_file </etc/hostname && [ "$chvm_file" = "$chvm_told_name" ] &&
            echo "$chvm_name" >/etc/hostname
        $chvm_busybox grep -qwF -e "$chvm_told_name" /etc/hosts && $chvm_busybox sed -i "s/\b$chvm_told_name\b/$chvm_name/g" /etc/hosts
    fi
} 2>/dev/null
# Of the same types as before. Those that the host hands over are written, into the files that are there, and so as readable as these.
# Where it hands over none, one is made here at once; the others in the background, when the test is likely to be over: an RSA key
# takes an emulated processor many seconds.
chvm_ssh_keys() {
    chvm_types= chvm_files=
    for chvm_file in /etc/ssh/ssh_host_*_key; do
        [ -e "$chvm_file" ] || return
        chvm_type=${chvm_file#*ssh_host_} chvm_type=${chvm_type%_key}
        chvm_told_key $chvm_type "$@" && continue
        chvm_types="$chvm_types $chvm_type" chvm_files="$chvm_files $chvm_file $chvm_file.pub"
    done
    [ -z "$chvm_files" ] || $chvm_busybox rm -f $chvm_files
    case " $chvm_types " in *' ed25519 '*) chvm_make_key ed25519 && chvm_types=${chvm_types% ed25519*}${chvm_types#* ed25519} ;; esac
    chvm_reload_ssh
    [ "$chvm_types" ] || return
    {
        sleep 10
        for chvm_type in $chvm_types; do chvm_make_key $chvm_type; done
    } </dev/null >/dev/null 2>&1 &
} 2>/dev/null
# chvm_told_key TYPE WORD...
chvm_told_key() {
    chvm_file=/etc/ssh/ssh_host_$1_key chvm_type=$1
    shift
    for chvm_word; do
        case $chvm_word in
        chvm.ssh_key=$chvm_type,*)
            chvm_ifs=$IFS IFS=,
            set -- ${chvm_word#*=}
            IFS=$chvm_ifs
            echo "$2" >$chvm_file.pub
            shift 2
            printf '%s\n' "-----BEGIN OPENSSH PRIVATE KEY-----" "$@" "-----END OPENSSH PRIVATE KEY-----" >$chvm_file
            return
            ;;
        esac
    done
    return 1
}
chvm_make_key() {
    chvm_nice=
    command -v nice >/dev/null && chvm_nice="nice -n 19"
    $chvm_nice ssh-keygen -q -t $1 -N '' -C "root@${chvm_name:-clone}" -f /etc/ssh/ssh_host_$1_key </dev/null >/dev/null
}
# Another one of OpenSSH's is told, and waited for: it removes the file of its number, and writes it once it listens again.
chvm_reload_ssh() {
    [ "$chvm_sshd_reads_keys" ] && return
    for chvm_file in /run/sshd.pid /var/run/sshd.pid; do
        [ -e $chvm_file ] && read -r chvm_pid <$chvm_file || continue
        $chvm_busybox rm -f $chvm_file
        kill -HUP $chvm_pid || return
        chvm_tries=0
        until [ -s $chvm_file ] || [ $chvm_tries = 100 ]; do
            chvm_tries=$((chvm_tries + 1))
            $chvm_busybox sleep 0.05
        done
        return
    done
}
# What a clone need not find out: before 9.8 OpenSSH's sshd reads its keys anew for each connection.
chvm_prepare() {
    chvm_sshd_reads_keys=
    case $(PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin && sshd -V 2>&1 </dev/null) in
    *OpenSSH_[1-8].* | *OpenSSH_9.[0-7][!0-9]*) chvm_sshd_reads_keys=1 ;;
    esac
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
    chvm_ssh_keys "$@"
    for chvm_word; do
        case $chvm_word in
        chvm.net=*) chvm_told_nic ${chvm_word#*=} ;;
        esac
    done >$chvm_console 2>&1
    [ -d /sys/bus/pci/drivers/pvpanic-pci ] || chvm_failed="$chvm_failed panic"
    chvm_say_ready
}

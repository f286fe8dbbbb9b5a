# Looks at the file systems of a disk, each mounted read-only, in a VM that has it for this alone. Reads lines DEVICE TYPE, and says
#   mounted DEVICE           or: refused DEVICE WHY
#   root DEVICE PREFIX       where there is an init, below PREFIX/ of the file system
#   kernel DEVICE PATH       what may be one
#   config DEVICE PATH       a boot loader's
#   cloud-init DEVICE PREFIX where a system has something that reads a seed: cloud-init, tiny-cloud, coreos-cloudinit
say() { printf '%s %s %s\n' "$1" "$device" "$2"; }
while read -r device type; do
    place=/mnt/$device
    case $type in
    ext4) options=ro,noload ;;
    xfs) options=ro,norecovery,nouuid ;;
    # All of its subvolumes.
    btrfs) options=ro,rescue=nologreplay,subvolid=5 ;;
    *) options=ro ;;
    esac
    mkdir -p $place
    if ! why=$(mount -t $type -o $options /dev/$device $place 2>&1); then
        say refused "$(echo $why | head -c 200)"
        continue
    fi
    say mounted ""
    cd $place
    for prefix in . root @ @rootfs @/.snapshots/1/snapshot; do
        [ -d $prefix ] || continue
        if [ -d $prefix/etc ]; then
            for init in sbin/init usr/sbin/init usr/lib/systemd/systemd lib/systemd/systemd bin/init; do
                # A link may be absolute, and lead nowhere here.
                if [ -e $prefix/$init ] || [ -L $prefix/$init ]; then say root $prefix && break; fi
            done
            for file in $prefix/etc/*cloud* $prefix/usr/bin/*cloud-init* $prefix/usr/bin/*cloudinit*; do
                [ -e $file ] && say cloud-init $prefix && break
            done
        fi
        for file in $prefix/boot/* $prefix/vmlinu* $prefix/*/vmlinu* $prefix/usr/lib/modules/*/vmlinuz $prefix/lib/modules/*/vmlinuz; do
            [ -f $file ] && say kernel $file
        done
        for file in $prefix/loader/loader.conf $prefix/loader/entries/*.conf $prefix/boot/loader/loader.conf \
            $prefix/boot/loader/entries/*.conf $prefix/grub*/grub.cfg $prefix/grub*/grubenv $prefix/boot/grub*/grub.cfg \
            $prefix/boot/grub*/grubenv $prefix/extlinux.conf $prefix/extlinux/extlinux.conf $prefix/boot/extlinux.conf \
            $prefix/boot/extlinux/extlinux.conf $prefix/boot/syslinux/syslinux.cfg; do
            [ -f $file ] && say config $file
        done
    done
done
true

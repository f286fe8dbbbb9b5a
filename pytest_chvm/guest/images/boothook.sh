#cloud-boothook
#!/bin/sh
# cloud-init's first act in an image that its own boot loader boots: what is put in front of other images comes from the seed.
[ -e /run/chvm/stock.sh ] && exit
# /run may be a place that no program is run from.
mkdir -p /run/chvm && mount -t tmpfs -o mode=0755,nosuid,nodev chvm /run/chvm || exit
seed=$(blkid -L cidata) && mkdir /run/chvm/seed && mount -o ro "$seed" /run/chvm/seed || exit
cp /run/chvm/seed/chvm/* /run/chvm
umount /run/chvm/seed
chmod +x /run/chvm/busybox /run/chvm/renew
cat /proc/cmdline >>/run/chvm/words
if [ -d /run/systemd/system ]; then
    cp /run/chvm/*.service /run/systemd/system
    systemctl daemon-reload
    systemctl mask --runtime serial-getty@hvc0.service
    # Of the last one, those that it waits for are on their way now.
    systemctl start --no-block chvm-console.service chvm-setup.service chvm-ready.service
else
    setsid sh /run/chvm/stock.sh beside_init &
fi

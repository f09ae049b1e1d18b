#!/bin/busybox sh
# The first process of a cluster's machine: finds the disks and goes on there.
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs devtmpfs /dev
for module in virtio_pci virtio_blk crc32c_generic ext4; do
	busybox modprobe $module 2>/dev/null # or built in
done
tries=0
until [ -b /dev/vdc ] || [ $tries -eq 300 ]; do
	busybox sleep 0.1
	tries=$((tries + 1))
done
busybox mount -t ext4 -o noatime /dev/vda /disk
busybox mount -t ext4 -o noatime /dev/vdb /disk/cluster
for dir in proc sys dev; do
	busybox mount --move /$dir /disk/$dir
done
exec busybox switch_root /disk /cluster/init

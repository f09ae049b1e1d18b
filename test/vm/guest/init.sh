#!/bin/sh
# The only process of a test machine: mounts what programs expect, runs the tests, tells
# the verdict, powers off.
export PATH=/bin HOME=/tmp TMPDIR=/tmp
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm /etc
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
ifconfig lo up
for module in loop crc32c_generic ext4; do
	modprobe $module 2>/dev/null # or built in
done
run=$(sed -n 's/.*imgdisk\.run=\([^ ]*\).*/\1/p' /proc/cmdline)
cd /tmp
# CI: here nothing may be skipped for want of a tool.
CI=true IMGDISK_VM_GUEST=1 guest.test -test.v -test.timeout 7m ${run:+-test.run "$run"}
code=$?
[ $code -eq 0 ] || dmesg | tail -n 60
echo "imgdisk-vm verdict: $code"
poweroff -f

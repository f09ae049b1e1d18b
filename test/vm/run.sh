#!/bin/sh
# A test machine's init on its disk: mounts what programs expect, runs what the kernel's
# command line names, tells the verdict, powers off.
export PATH=/bin HOME=/tmp TMPDIR=/tmp
echo "imgdisk-vm begins"
mkdir -p /dev/shm
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
ln -sf /proc/mounts /etc/mtab
ifconfig lo up
modprobe loop 2>/dev/null # or built in
set -f # no argument is a pattern for file names
option() { sed -n "s/.*imgdisk\.$1=\([^ ]*\).*/\1/p" /proc/cmdline; }
cd /tmp
# CI: here nothing may be skipped for want of a tool.
CI=true IMGDISK_VM_GUEST=$(option machine) $(option arguments | tr , ' ')
code=$?
if [ $code -ne 0 ]; then
	echo "what the kernel said, that tells most:"
	dmesg | grep -E 'Out of memory|oom-kill|page allocation failure|BUG: |Oops|WARNING: |blocked for more than|Send .* failed' | head -n 20
	echo "… and last:"
	dmesg | tail -n 80
fi
echo "imgdisk-vm verdict: $code"
poweroff -f

#!/bin/bash
# Makes the image's root file system in a new directory, as root:
#
#   image/rootfs.sh DIR
#
# The same archive (DEBIAN_MIRROR, such as http://snapshot.debian.org/archive/debian/20261121T000000Z)
# makes the same files, with the same times. The Dockerfile, image/build.sh and the tests' cluster use it.
set -euo pipefail

dir=$1
here=$(cd "$(dirname "$0")" && pwd)
suite=${DEBIAN_SUITE:-bookworm}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
packages=$(grep -v '^#' "$here/packages" | paste -sd, -)
if ! command -v debootstrap >/dev/null; then
  echo "image/rootfs.sh: debootstrap is missing: apt-get install debootstrap" >&2
  exit 1
fi

start=$(mktemp)
trap 'rm -f "$start"' EXIT
debootstrap --variant=minbase --include="$packages" "$suite" "$dir" "$mirror"

# What only this build knows: dates, this machine, logs, caches.
rm -rf "$dir"/var/cache/* "$dir"/var/log/* "$dir"/var/lib/apt/lists/* "$dir"/debootstrap \
  "$dir"/tmp/* "$dir"/run/* "$dir"/dev/* "$dir"/var/lib/dpkg/*-old "$dir"/etc/*- \
  "$dir"/etc/hostname "$dir"/etc/resolv.conf "$dir"/etc/ssl/certs/java
: >"$dir/etc/machine-id"
sed -i -E 's/^([^:]*:[^:]*):[0-9]*:/\1:1:/' "$dir/etc/shadow"
find "$dir" -name '__pycache__' -type d -prune -exec rm -rf {} +
# Documentation, but for the licences.
find "$dir/usr/share/doc" -type f ! -name copyright -delete
find "$dir/usr/share/doc" -type l -delete
find "$dir/usr/share/doc" -depth -type d -empty -delete
rm -rf "$dir"/usr/share/{man,info,locale,lintian,bash-completion}
# Where the chart mounts things.
mkdir -p "$dir/csi" "$dir/etc/csi-imgdisk" "$dir/var/lib/csi-imgdisk/stores" "$dir/run/csi-imgdisk"

# What the packages did not bring with a time of its own is as old as the youngest file that they did.
youngest=$(find "$dir" ! -newer "$start" -type f -printf '%T@\n' | sort -n | tail -1)
find "$dir" -newer "$start" -exec touch -h -d "@${youngest%.*}" {} +

#!/bin/bash
# Makes the container image without Docker, as root: .cache/image/csi-imgdisk.tar and its
# bill of materials. bin/csi-imgdisk is there already (make build). The root file system is
# kept, and made anew when its recipe has changed.
set -euo pipefail
cd "$(dirname "$0")/.."

name=${1:-ghcr.io/csi-imgdisk/csi-imgdisk:dev}
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
out=.cache/image
recipe=$(cat image/packages image/rootfs.sh <(echo "${DEBIAN_SUITE:-} ${DEBIAN_MIRROR:-}") | sha256sum | cut -c1-16)
mkdir -p "$out"
if [[ ! -d $out/rootfs-$recipe ]]; then
  if [[ $EUID != 0 ]]; then
    echo "image/build.sh: debootstrap needs root" >&2
    exit 1
  fi
  command -v debootstrap >/dev/null || apt-get install -qq -y --no-install-recommends debootstrap
  rm -rf "$out"/rootfs-* "$out/new" # with the layers of earlier recipes
  image/rootfs.sh "$out/new"
  mv "$out/new" "$out/rootfs-$recipe"
fi
go run ./image -rootfs "$out/rootfs-$recipe" -binary bin/csi-imgdisk -name "$name" -out "$out/csi-imgdisk.tar"

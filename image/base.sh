#!/bin/bash
# Prints the directory with the image's root file system. Makes it, as root, if it is not
# there or its recipe has changed.
set -euo pipefail
cd "$(dirname "$0")/.."

out=$PWD/.cache/image
recipe=$(cat image/packages image/rootfs.sh <(echo "${DEBIAN_SUITE:-} ${DEBIAN_MIRROR:-}") | sha256sum | cut -c1-16)
mkdir -p "$out"
exec 9>"$out/.lock"
flock 9
if [[ ! -d $out/rootfs-$recipe ]]; then
  if [[ $EUID != 0 ]]; then
    echo "image/base.sh: debootstrap needs root" >&2
    exit 1
  fi
  command -v debootstrap >/dev/null || apt-get install -qq -y --no-install-recommends debootstrap >&2
  rm -rf "$out"/rootfs-* "$out/new" # with the layers of earlier recipes
  image/rootfs.sh "$out/new" >&2
  mv "$out/new" "$out/rootfs-$recipe"
fi
echo "$out/rootfs-$recipe"

#!/bin/bash
# Installs the Debian or Ubuntu packages that something here needs and that are missing.
#
#   hack/install-deps.sh test   what `make test` compares with, and makes file systems with
#   hack/install-deps.sh demo   what `csi-imgdisk demo` runs
#
# Without root it says what to install, and fails.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

# program:package
demo=(
  mkfs.ext4:e2fsprogs
  mount:mount
  losetup:mount
  blkid:util-linux
  qemu-img:qemu-utils
  mkfs.xfs:xfsprogs
  sfdisk:fdisk
)
test=(
  "${demo[@]}"
  mkfs.btrfs:btrfs-progs
  qemu-io:qemu-utils
  qemu-nbd:qemu-utils
  nbdkit:nbdkit
  nbdinfo:libnbd-bin
  nbdcopy:libnbd-bin
  fio:fio
  7z:p7zip-full
  vmdkinfo:libvmdk-utils
  xz:xz-utils
  unshare:util-linux
  fuser:psmisc
)

case ${1:-} in
  test) wanted=("${test[@]}") ;;
  demo) wanted=("${demo[@]}") ;;
  *) echo "usage: $0 test|demo" >&2; exit 2 ;;
esac

missing=()
for entry in "${wanted[@]}"; do
  command -v "${entry%%:*}" >/dev/null || missing+=("${entry#*:}")
done
if [[ ${#missing[@]} -eq 0 ]]; then
  exit 0
fi
mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)

if ! command -v apt-get >/dev/null; then
  echo "These packages of Debian's are missing, and there is no apt-get to install them: ${missing[*]}" >&2
  exit 1
fi
if [[ $EUID -ne 0 ]]; then
  echo "Packages are missing. As root: apt-get install ${missing[*]}" >&2
  exit 1
fi
echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
install=(apt-get install -qq -y --no-install-recommends "${missing[@]}")
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# The lists may be missing or out of date: then fetch them and try again.
if ! "${install[@]}" >"$log" 2>&1; then
  if ! { apt-get update -qq && "${install[@]}"; } >"$log" 2>&1; then
    cat "$log" >&2
    echo "could not install ${missing[*]}" >&2
    exit 1
  fi
fi

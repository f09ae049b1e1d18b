#!/bin/bash
# Installs the Debian or Ubuntu packages that something here needs and that are missing.
#
#   hack/install-deps.sh test   what `make test` compares with, and makes file systems with
#   hack/install-deps.sh e2e    what a test cluster is made with
#   hack/install-deps.sh demo   what `csi-imgdisk demo` runs
#
# Without root it says what to install, and fails. The demo goes without what it only
# proves things with.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

# program:package
needed=(
  mkfs.ext4:e2fsprogs
  mount:mount
  losetup:mount
  blkid:util-linux
)
useful=(
  qemu-img:qemu-utils
  mkfs.xfs:xfsprogs
  sfdisk:fdisk
)
oracles=(
  mkfs.btrfs:btrfs-progs
  qemu-io:qemu-utils
  qemu-nbd:qemu-utils
  nbdkit:nbdkit
  nbdinfo:libnbd-bin
  nbdcopy:libnbd-bin
  nbd-client:nbd-client
  fio:fio
  7z:p7zip-full
  vmdkmount:libvmdk-utils
  vhdimount:libvhdi-utils
  qcowmount:libqcow-utils
  qcowmount:libqcow-utils
  xz:xz-utils
  unshare:util-linux
  fuser:psmisc
)

cluster=(
  qemu-system-x86_64:qemu-system-x86
  qemu-img:qemu-utils
  debootstrap:debootstrap
  busybox:busybox-static
  etcd:etcd-server
  ip:iproute2
  nsenter:util-linux
  xz:xz-utils
)

# missing PROGRAM:PACKAGE…: the packages of programs that are not there.
missing() {
  local entry
  for entry in "$@"; do
    command -v "${entry%%:*}" >/dev/null || echo "${entry#*:}"
  done | sort -u
}

# install PACKAGE…: installs them, or says why not.
install() {
  if ! command -v apt-get >/dev/null; then
    echo "These packages of Debian's are missing, and there is no apt-get to install them: $*" >&2
    return 1
  fi
  if [[ $EUID -ne 0 ]]; then
    echo "Packages are missing. As root: apt-get install $*" >&2
    return 1
  fi
  echo "installing $*"
  local log command=(apt-get install -qq -y --no-install-recommends "$@")
  log=$(mktemp)
  # The lists of packages may be missing or out of date: then fetch them and try again.
  if "${command[@]}" >"$log" 2>&1 || { apt-get update -qq && "${command[@]}"; } >"$log" 2>&1; then
    rm -f "$log"
    return 0
  fi
  cat "$log" >&2
  rm -f "$log"
  echo "could not install $*" >&2
  return 1
}

export DEBIAN_FRONTEND=noninteractive
case ${1:-} in
  test)
    mapfile -t packages < <(missing "${needed[@]}" "${useful[@]}" "${oracles[@]}")
    [[ ${#packages[@]} -eq 0 ]] || install "${packages[@]}"
    ;;
  e2e)
    mapfile -t packages < <(missing "${needed[@]}" "${cluster[@]}")
    [[ ${#packages[@]} -eq 0 ]] || install "${packages[@]}"
    ;;
  demo)
    mapfile -t packages < <(missing "${needed[@]}")
    [[ ${#packages[@]} -eq 0 ]] || install "${packages[@]}"
    mapfile -t packages < <(missing "${useful[@]}")
    [[ ${#packages[@]} -eq 0 ]] || install "${packages[@]}" || echo "going on without ${packages[*]}"
    ;;
  *)
    echo "usage: $0 test|e2e|demo" >&2
    exit 2
    ;;
esac

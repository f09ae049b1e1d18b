#!/bin/bash
# Makes sample.vmdk, the disk that `csi-imgdisk demo` imports: a streamOptimized VMDK, as
# an export from vSphere has, with an ext4 file system of 64 MiB in it. Needs e2fsprogs
# and qemu-img; writes beside itself.
set -euo pipefail
cd "$(dirname "$0")"
PATH=$PATH:/usr/sbin:/sbin

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/files"
cat >"$work/files/letter.txt" <<'LETTER'
Dear reader,

this file was written to a disk of a virtual machine. The disk was exported as a
streamOptimized VMDK, put on a share, and is a volume of Kubernetes' now. Nobody
copied or converted it.
LETTER
seq 1 40000 >"$work/files/numbers.txt"
(cd "$work/files" && sha256sum letter.txt numbers.txt >sums.txt)
find "$work/files" -exec touch -d @1700000000 {} +

export E2FSPROGS_FAKE_TIME=1700000000
truncate -s 64M "$work/disk.raw"
mkfs.ext4 -q -F -L sample -U 1f2e3d4c-5b6a-4978-8897-a6b5c4d3e2f1 -m 0 \
  -E root_owner=0:0,hash_seed=0f1e2d3c-4b5a-4697-8879-a6b5c4d3e2f1 \
  -d "$work/files" "$work/disk.raw"
rm -f sample.vmdk
qemu-img convert -f raw -O vmdk -o subformat=streamOptimized "$work/disk.raw" sample.vmdk
ls -l sample.vmdk

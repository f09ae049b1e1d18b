#!/bin/bash
# Makes the container image without Docker, as root: .cache/image/csi-imgdisk.tar and its
# bill of materials. bin/csi-imgdisk is there already (make build).
set -euo pipefail
cd "$(dirname "$0")/.."

name=${1:-ghcr.io/csi-imgdisk/csi-imgdisk:dev}
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
rootfs=$(image/base.sh)
go run ./image -rootfs "$rootfs" -binary bin/csi-imgdisk -name "$name" -out .cache/image/csi-imgdisk.tar

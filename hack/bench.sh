#!/bin/bash
# Measures speed beside qemu-nbd on the same image and nbdkit on a raw file: same client
# (fio's nbd engine), same file system, one run. Only ratios mean anything.
#
#   BENCH_DIR      where images lie; default a directory under /tmp
#   BENCH_SECONDS  per measurement; default 5
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${BENCH_SECONDS:-5}
dir=$(mktemp -d "${BENCH_DIR:-/tmp}/csi-imgdisk-bench.XXXXXX")
server=
cleanup() {
  [[ -z $server ]] || kill "$server" 2>/dev/null || true
  wait 2>/dev/null || true
  rm -rf "$dir"
}
trap cleanup EXIT

make --no-print-directory build >/dev/null
imgdisk=$PWD/bin/csi-imgdisk
socket=$dir/sock
size=1G

# start SERVER FORMAT IMAGE: serves an image on the socket.
start() {
  rm -f "$socket"
  case $1 in
    csi-imgdisk) "$imgdisk" serve "$3" --format "$2" --socket "$socket" --run-dir "$dir/run" >/dev/null & ;;
    qemu-nbd) qemu-nbd -t -k "$socket" -f "$2" "$3" & ;;
    nbdkit) nbdkit -f -U "$socket" file "$3" & ;;
  esac
  server=$!
  for _ in {1..200}; do
    [[ -S $socket ]] && return
    sleep 0.05
  done
  echo "$1 does not listen" >&2
  exit 1
}

stop() {
  kill "$server"
  wait "$server" || true
  server=
}

# measure RW BLOCKSIZE DEPTH: operations and KiB a second, as "IOPS KIB".
measure() {
  fio --name=bench --ioengine=nbd --uri="nbd+unix:///?socket=$socket" --rw="$1" --bs="$2" \
    --iodepth="$3" --size=$size --time_based --runtime="$seconds" --norandommap --randrepeat=0 \
    --output-format=terse --terse-version=3 2>/dev/null |
    awk -F';' '/^3;/ { print ($8 > $49 ? $8 : $49), ($7 > $48 ? $7 : $48) }'
}

new_image() { # FORMAT PATH
  rm -f "$2"
  "$imgdisk" image create --format "$1" "$2" $size >/dev/null
}

fill() { # FORMAT PATH: every cluster gets contents
  start csi-imgdisk "$1" "$2"
  fio --name=fill --ioengine=nbd --uri="nbd+unix:///?socket=$socket" --rw=write --bs=1M --iodepth=4 --size=$size >/dev/null 2>&1
  stop
}

printf '%-34s %-12s %-8s %10s %10s\n' work server image ops/s MiB/s
row() { printf '%-34s %-12s %-8s %10.0f %10.0f\n' "$1" "$2" "$3" "$4" "$(("$5" / 1024))"; }

contenders=("csi-imgdisk vmdk" "qemu-nbd vmdk" "csi-imgdisk raw" "qemu-nbd raw" "nbdkit raw")
for format in vmdk raw; do
  new_image $format "$dir/full.$format"
  fill $format "$dir/full.$format"
done

while IFS=, read -r title rw bs depth; do
  for contender in "${contenders[@]}"; do
    read -r name format <<<"$contender"
    start "$name" "$format" "$dir/full.$format"
    read -r iops kib < <(measure "$rw" "$bs" "$depth")
    stop
    row "$title" "$name" "$format" "$iops" "${kib%.*}"
  done
done <<'WORK'
4 KiB random read depth 32,randread,4k,32
4 KiB random overwrite depth 32,randwrite,4k,32
4 KiB random read depth 1,randread,4k,1
1 MiB sequential read depth 4,read,1M,4
1 MiB sequential write depth 4,write,1M,4
WORK

for contender in "${contenders[@]}"; do
  read -r name format <<<"$contender"
  new_image "$format" "$dir/new.$format"
  start "$name" "$format" "$dir/new.$format"
  read -r iops kib < <(measure randwrite 4k 32)
  stop
  row "4 KiB random first write depth 32" "$name" "$format" "$iops" "${kib%.*}"
done

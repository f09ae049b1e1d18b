#!/bin/sh
# Imports images into a containerd that runs in the machines' root file system, but on the
# machine that makes their disks, which is faster than an emulated one. It is run in mount
# and process namespaces of its own, so it leaves nothing behind. Arguments: the root file
# system, the directory for the disk, in which directory images has the archives.
set -e
tree=$1 disk=$2
mount --bind "$disk" "$tree/cluster"
mount -t tmpfs tmpfs "$tree/run"
mount -t tmpfs tmpfs "$tree/tmp"
mount --rbind /dev "$tree/dev"
mount -t proc proc "$tree/proc"
cat >"$tree/run/import.toml" <<'EOF'
version = 2
root = "/cluster/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
  address = "/run/import.sock"
EOF
chroot "$tree" containerd --config /run/import.toml >"$tree/run/log" 2>&1 &
tries=0
until chroot "$tree" ctr -a /run/import.sock version >/dev/null 2>&1; do
	tries=$((tries + 1))
	[ $tries -lt 300 ] || { tail -n 20 "$tree/run/log" >&2; exit 1; }
	sleep 0.2
done
for archive in "$tree"/cluster/images/*; do
	chroot "$tree" ctr -a /run/import.sock -n k8s.io images import "/cluster/images/${archive##*/}" ||
		{ tail -n 20 "$tree/run/log" >&2; exit 1; }
done
kill $!
wait $! || true

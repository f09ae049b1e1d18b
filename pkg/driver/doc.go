// Package driver is the CSI driver: the Identity, Controller and Node services. It
// validates requests, delegates to the interfaces it declares in contracts.go, and
// translates errors in errors.go; nothing else. Packages wire and hostmount connect it to
// the real store and supervisor, and to the host.
//
// # Where things are
//
//	driver.go        Config, Driver, which services run
//	server.go        the gRPC server: socket, logging, panics, graceful stop
//	contracts.go     what the driver needs: Store, Attacher, Mounter
//	handle.go        volume and snapshot handles; names from CSI names
//	parameters.go    StorageClass parameters
//	capability.go    access modes, file systems and their least sizes
//	inflight.go      one operation per volume; work that outlives its call
//	identity.go      Identity
//	controller.go    volumes: create, delete, publish, expand, get
//	snapshots.go     snapshots: create, delete, get
//	listing.go       lists, pages and their tokens
//	stage.go         Node: stage and unstage
//	publish.go       Node: publish and unpublish
//	nodestate.go     Node: expansion, statistics, health, what the node is
//	errors.go        errors to gRPC codes: the only file that knows codes
//
// # StorageClass parameters
//
//	store          name of a configured store; not needed if there is only one
//	format         of the volume's own layers: vmdk (default), raw
//	subformat      of the format, such as monolithicFlat
//	clusterSize    of the format: a power of two such as 65536, 64K, 64Ki or 1M
//	preallocation  off (default), or what else the format has; ignored for what is restored or cloned
//	transport      nbd, ublk or fuse; default: the best that works on the node
//	image          file under the store's images/ to make the volume from
//	imageMode      overlay (default: the volume stands on the image) or copy
//
// and csi.storage.k8s.io/fstype: ext4 (default), xfs, btrfs. Others beginning with
// csi.storage.k8s.io/ are ignored, all else is refused.
//
// # Handles
//
// A volume's is "<store>/<volume>", a snapshot's "<store>/<volume>@<snapshot>". Volumes
// and snapshots have the caller's name, shortened or spelled otherwise, with a hash, if
// that could not be a file's everywhere or would make a handle longer than CSI allows.
// "<store>/images/<file>" is an image used as a volume without CreateVolume: publishing
// makes the overlay that is written in its place.
//
// # Limits
//
//   - One node at a time writes a volume; several can read one that nobody writes.
//   - A raw block target is read-only only if the volume is published read-only.
//   - Linux before 6.7 does not mount a btrfs beside its clone on one node.
//   - The kernel grows a mounted ext4 only for a driver that has CAP_SYS_RESOURCE.
//   - A partitioned disk can be used as raw block only.
//   - A device that was lost under a mounted file system must be unpublished and
//     unstaged before the volume can be staged again.
//
// # Killed at any point
//
// The driver keeps no state. What is true is in three places: the store's records, the
// supervisor's attachments and the kernel's mount table. Every call looks there first
// and does only what is missing, in an order in which each step is of no harm when the
// next never comes:
//
//   - stage: attach (idempotent by handle), make a file system if there is nothing on
//     the device, mount it, grow it;
//   - unstage: unmount until nothing is mounted there, then detach;
//   - publish: make the target, bind it, make the bind mount read-only;
//   - unpublish: unmount, remove the target.
//
// # Hung storage
//
// Unmounting and asking for statistics can hang for as long as the store does. A call
// waits for them until its deadline, and gives up its lock on the volume; the work goes
// on, and a repeated call joins it instead of starting it again. Until an unmount has
// ended, the volume is not staged or published again.
package driver

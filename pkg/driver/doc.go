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

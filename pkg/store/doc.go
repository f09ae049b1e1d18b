// Package store keeps volumes on one shared directory: records, layers, locks,
// snapshots, capacity, garbage. It is complete in itself: everything that is known about
// a volume is in the directory, and any number of controllers and nodes may use it at
// once.
//
// # Layout (version 1)
//
//	store.json                              identity, layout version
//	volumes/<volume>/volume.json            the record (see Record)
//	volumes/<volume>/volume.lock            held while the record is read, changed, replaced
//	volumes/<volume>/<volume>.vmdk          base layer
//	volumes/<volume>/<volume>-000001.vmdk   overlay, and so on
//	images/                                 put there by people: import sources and golden images, never written
//
// # Rules
//
//   - A record changes by write-new, sync, rename, sync directory, under the volume's
//     lock, which is held for moments only.
//   - An image is changed only by the holder of its write lock (QEMU's byte ranges).
//   - The record is the request. Who wants a snapshot, an expansion or the removal of a
//     layer writes the wish into the record. Whoever holds the write lock of the top
//     layer carries wishes out: the server that has the volume attached, within a second;
//     or else the one who wished, who then gets the lock. Each step is recorded so that
//     the next holder finishes or undoes what a dead one left.
//   - Garbage is computed: mark from the records, sweep what nothing marks. A layer
//     lives while a volume that is not deleted, or a snapshot, reaches it through
//     parents. A deleted volume's directory and record stay while anything needs a
//     layer in it.
//   - Epochs fence: Publish to another node, or Unpublish, raises the record's epoch. A
//     holder that finds its epoch outdated stops writing for good.
package store

// Package store keeps volumes on one shared directory: records, layers, locks, snapshots,
// capacity, garbage. It is complete in itself: everything that is known about a volume is
// in the directory, and any number of controllers and nodes may use it at once.
//
// # Layout (version 1)
//
//	store.json                              identity, layout version
//	store.lock                              see Locks
//	volumes/<volume>/volume.json            the record (see Record)
//	volumes/<volume>/volume.lock            held while the record is read, changed, replaced
//	volumes/<volume>/<volume>.vmdk          base layer
//	volumes/<volume>/<volume>-000001.vmdk   overlay, and so on
//	spare/                                  space for records when the store is full
//	images/                                 put there by people: import sources and golden images, never written
//
// # Order of reading
//
//	record.go    what is known of a volume
//	recordio.go  reading it; replacing it
//	names.go     which names mean what
//	spare.go     replacing it in a full store
//	lock.go      locks on records
//	store.go     opening a store; probe.go: whether its locks work
//	create.go    volumes from nothing, images, snapshots, volumes; source.go: from which;
//	             background.go: longer than the caller waits
//	publish.go   which node a volume is for
//	attach.go    a volume as a device; watch.go: carrying out wishes live; fence.go: losing it
//	snapshot.go  snapshots; expand.go: growing
//	delete.go    deleting; sweep.go: what nothing needs; batch.go: with one reading of all
//	             records for several; merge.go, mergelive.go: shorter chains; gc.go: all of it
//	check.go     what is wrong; tree.go, draw.go: what stands on what
//
// # Rules
//
//   - A record changes by write-new, sync, rename, sync directory, under the volume's
//     lock. It is held for moments, except while the volume is being made.
//   - An image is changed only by the holder of its write lock (QEMU's byte ranges). A
//     layer that is no longer a top never changes.
//   - The record is the request. Who wants a snapshot or an expansion writes the wish into
//     the record. The node that serves the volume carries it out within a second; if
//     none does, the one who wished does it. Each step is recorded so that the next
//     holder finishes or undoes what a dead one left.
//   - A node that serves a volume says so in the record before it opens it, and takes that
//     back after a clean close. In between nobody else takes snapshots or grows it, even
//     when the server is dead for the moment: what it had completed may still be in the
//     redo journal of that node. Unpublish ends this, and gives up what was not flushed.
//   - Each publication has an epoch of its own. A server whose publication is over stops
//     writing for good: below the image formats, so that a flush stops, too.
//   - Garbage is computed: mark from all records, sweep what nothing marks. A layer lives
//     while a volume that is not deleted, or a snapshot, reaches it through parents. A
//     deleted volume's directory and record stay while anything needs a layer in it. As
//     long as any record is unreadable nothing is removed.
//   - Formats are what records say. Contents are looked at once, when a volume is made
//     from an image.
//
// # Locks
//
// From outer to inner; none is waited for while an inner one is held:
//
//	merge.lock    of a volume: one merge at a time
//	image         byte ranges of the image files, from opening to closing; conflicts are
//	              not waited for, but tried again
//	volume.lock   a clone's before its source's
//	store.lock    held while references to other volumes' layers are made and while a
//	              sweep removes layers, so that neither sees half of the other; and
//	              while it is made sure that a snapshot's name is free
//
// # Limits
//
//   - Merging writes all frozen layers above the first merged one anew, because images
//     refer to what they stand on. A volume in use whose format cannot change its top's
//     parent keeps its layers, up to [Options.MaxChain], until it is detached.
//   - A snapshot's name is looked for in all records: with thousands of volumes on a slow
//     store that takes seconds.
//   - A volume that was deleted keeps its name until its snapshots and clones are gone.
//   - Whoever attaches a volume locally, without a publication, has no redo journal.
package store

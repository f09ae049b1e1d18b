// Package vmdk is VMware's virtual disk format: "Virtual Disk Format 1.1" (2007) and its
// successor "5.0", section names below are the former's.
//
//	format.go      the format's name and probing
//	open.go        from files to an image: which kind it is, its extents, what is refused
//	descriptor.go  the text that says what an image is made of ("The Descriptor File")
//	header.go      the first sector of a sparse extent ("Hosted Sparse Extents")
//	parent.go      links of delta images ("Delta Links")
//	image.go       what the engine asks of an image: dispatch to its extents
//	sparse.go      grain directories and tables: who holds a guest byte
//	change.go      changing grain tables, and adding missing ones
//	stream.go      compressed grains ("Stream-Optimized Compressed Sparse Extents")
//	begin.go       the content identifier (CID)
//	grow.go        enlarging
//	check.go       checking and repairing
//	reclaim.go     finding lost space
//	describe.go    what `image info` shows
//	create.go      making new images
//
// # What is supported
//
// Read and written: monolithicSparse; monolithicFlat and vmfs (flat); twoGbMaxExtentSparse
// and twoGbMaxExtentFlat; header versions 1 to 3; grains of 4 KiB to 4 MiB; zeroed grains;
// redundant directories, whose tables are kept equal; delta images that name their parent
// by CID and file name.
//
// Read only: streamOptimized, with the directory at the head or, through a footer, at the
// end; other compressed extents; extents that say RDONLY; headers with unknown flags; and
// images with change tracking (changeTrackPath), because what we wrote would be missing
// from the changes tracked there.
//
// Created: monolithicSparse, also as an overlay, and monolithicFlat. The order in the file
// is VMware's and QEMU's. All grain tables have their place from the start, as holes.
//
// Refused, each with a sentence that names it: seSparse and COWD (vmfsSparse) extents,
// devices and partitions of a host, ZERO extents, encrypted images, an extent without its
// descriptor, a child that names its parent by ddb.uuid.parent alone (VirtualBox), extent
// files and parents that are absolute or lie outside the store, a parent whose CID is not
// the one its child was made on.
//
// # Choices where readers differ
//
// The guest's size is the descriptor's if the header's capacity differs by less than a
// grain (VirtualBox rounds the latter up), otherwise the header's: see guestSectors. QEMU
// always takes the header's.
//
// The extent's file name in an embedded descriptor is ignored: files get renamed.
//
// The header of a sparse extent in an image with a descriptor file must agree with the
// descriptor to within a grain.
//
// # Why crashes are harmless
//
// The engine has data durable before a commit writes tables. A commit writes grain tables,
// primary and redundant ones in any order, and syncs before it writes directories that
// name new tables. So at any moment each entry on disk, in either copy, is an old one or
// names a grain whose contents are durable; and each directory entry is 0 or names a table
// that was written. An old entry is no danger: the grain it names is used again only after
// the change that freed it, in both copies, is durable. What a crash leaves is space that
// nothing refers to, and redundant entries that are older or newer than their primary
// ones, which a check reports and a repair makes equal again.
//
// Begin replaces the CID's digits in place before the first change. Whatever part of them
// a crash keeps, the CID differs from what overlays have noted, unless nothing was written
// at all.
//
// Growing a sparse image writes complete new directories, and the tables they add, to
// space that nothing refers to, syncs, and then writes the header: one sector, which no
// crash tears. The descriptor follows, if the change fits into one of its sectors; until
// then, or for good, the header's size counts because it is greater by a grain or more.
// What changes less than that is refused if the descriptor cannot be changed so. A flat
// image's file is lengthened and synced first, then its descriptor is changed: in place if
// one sector changes, otherwise by a new file that takes the old one's name and is locked
// before it does.
//
// # Limits
//
// A sparse file ends at 2 TiB, which is what an entry can say; new images have at most
// 5 GiB less, so that their tables fit, too. Only images of one extent grow. Grains that
// were discarded are punched out of the file, but when the image is closed before they are
// used again, their place in the file is lost: the format has no map of free space. It is
// found again when the image is opened once a fifth of the file or more must be lost. A
// grown image's old directories are lost likewise. The ddb.geometry of a grown image is
// left alone where changing it would move the rest of an embedded descriptor into another
// sector. The tables of a check's image may need a bitmap: at most 64 MiB, or the check
// says so.
package vmdk

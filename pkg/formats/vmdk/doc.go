// Package vmdk is VMware's virtual disk format: "Virtual Disk Format 1.1" (2007) and its
// successor "5.0", section names below are the former's.
//
//	format.go       the format's name and probing
//	open.go         from files to an image: which kind it is, its extents, what is refused
//	descriptor.go   the text that says what an image is made of ("The Descriptor File")
//	encoding.go     file names in descriptors that are not in UTF-8
//	edit.go         changing a descriptor so that a crash leaves the old or the new one
//	header.go       the first sector of a sparse extent ("Hosted Sparse Extents")
//	cowd.go         and of ESX's ("ESX Server Sparse Extents")
//	parent.go       links of delta images ("Delta Links"), and VirtualBox's; changing them
//	image.go        what the engine asks of an image: dispatch to its extents
//	sparse.go       grain directories and tables: who holds a guest byte
//	change.go       changing grain tables, and adding missing ones
//	stream.go       compressed grains ("Stream-Optimized Compressed Sparse Extents")
//	streamwrite.go  writing a stream, once, from its beginning to its end
//	sesparse.go     ESXi's space-efficient extents: headers, and who holds a guest byte
//	sesparsejournal.go  replaying the journal of one that was not closed
//	sesparsewrite.go    what is free in one, and changing its tables
//	sesparsecheck.go    finding out whether its tables, back map and bitmap agree
//	begin.go        the content identifier (CID)
//	owners.go       no grain may have two owners when it is written
//	resize.go       growing and shrinking
//	check.go        checking and repairing
//	reclaim.go      finding lost space
//	describe.go     what `image info` shows
//	kinds.go        the subformats that are created
//	create.go       making new images
//	about.go        what a new descriptor says
//	measure.go      how long an image will be
//
// # What is supported
//
// Read and written: monolithicSparse; monolithicFlat and vmfs (flat); twoGbMaxExtentSparse
// and twoGbMaxExtentFlat; vmfsSparse (COWD); header versions 1 to 3; grains of 4 KiB to
// 4 MiB, of COWD from a sector on; zeroed grains; redundant directories, whose tables are
// kept equal; seSparse extents, whose journal is replayed if they were not closed; delta images that name their parent by CID and file name, or by VirtualBox's
// UUIDs: then it is looked for among the images beside the child and in the directory
// above, and must be the only one with that UUID.
//
// Written once: streamOptimized, by conversion (engine.Compressor), while it is empty.
//
// Read only: streamOptimized, with the directory at the head or, through a footer, at the
// end; other compressed extents; seSparse extents that are not laid out as they should be;
// images with ZERO extents; extents that say RDONLY; headers with unknown flags; and images with
// change tracking (changeTrackPath), because what we wrote would be missing from the
// changes tracked there, and the next incremental backup would miss it; likewise those with
// I/O filters of vSphere. Overlays can stand on all of them.
//
// Created: all of the above but seSparse and ZERO; overlays as monolithicSparse,
// twoGbMaxExtentSparse or vmfsSparse. The order in a file is VMware's and QEMU's. All grain
// tables but a stream's have their place from the start, as holes.
//
// Refused, each with a sentence that names it: devices and partitions of a host, encrypted
// images, an extent without its descriptor, seSparse extents whose journal makes no sense of
// their tables (its checksum is not public: see docs/decisions), file names in
// other encodings than UTF-8, windows-1252 and ISO-8859-1, extent files and parents that
// are absolute or lie outside the store, a parent whose CID or UUID is not the one its child
// was made on, and writing where two entries refer to one grain.
//
// # Choices where readers differ
//
// The guest's size is the descriptor's if the header's capacity differs by less than a
// grain (VirtualBox rounds the latter up), otherwise the header's: see guestSectors. QEMU
// always takes the header's. In an image with a descriptor file it is the descriptor's, and
// no header may say less.
//
// The extent's file name in an embedded descriptor is ignored: files get renamed.
//
// Version 3 means change tracking to VMware and compression to QEMU; what counts here is
// whether the descriptor names a file to track changes in.
//
// New images have VirtualBox's UUIDs beside VMware's identifiers, so that their overlays
// are overlays to VirtualBox, too.
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
// A COWD header says where the next grain goes (freeSector). It is raised, durably, before
// a table refers to what lies below it: other writers never take a grain in use for free.
//
// In an seSparse extent a commit first writes bitmap, back map and the number of the next
// table, and syncs, before tables: at any moment each grain that an entry on disk names is
// marked, and its own. A grain that is given back keeps its mark and owner until no entry on
// disk names it; only the guest grain it was part of may take it again before. A table's
// number is noted as taken before the directory names it; one that a crash leaves unnamed is
// found and used. Before the first change the journal is replayed, if it has to be, and made
// void: old transactions must never be applied to new tables.
//
// Begin replaces the CID's digits in place before the first change. Whatever part of them
// a crash keeps, the CID differs from what overlays have noted, unless nothing was written
// at all.
//
// A stream is complete when its footer is there. What a crash leaves of one before is
// refused by everybody, as truncated; conversion gives it its name last.
//
// A descriptor is changed by writing one of its sectors, which no crash tears; or, if it
// has a file of its own, by a new file that takes the old one's name and is locked before
// it does. Lines that say nothing make up for changed lengths. What an embedded descriptor
// of ours says about the parent lies in one sector; another's, where it does not, is left
// alone, and changing the parent refused.
//
// Growing an image in one file writes complete new directories, and the tables they add,
// to space that nothing refers to, syncs, and then writes the header: one sector. The
// descriptor follows, if the change fits into one of its sectors; until then, or for good,
// the header's size counts because it differs by a grain or more. What changes less than
// that is refused if the descriptor cannot be changed so. Shrinking is the same: the
// engine has durably unmapped what goes.
//
// With a descriptor file, growing lengthens the last extent and makes further ones, syncs,
// and then changes the descriptor; shrinking changes the descriptor first and then cuts and
// removes files. In between, extents are longer than the descriptor says, or files are left
// over whose names nothing uses again.
//
// # Limits
//
// A sparse file ends at 2 TiB, which is what an entry can say; new images have at most
// 5 GiB less, so that their tables fit, too. Images of 2 GiB extents have at most 1024 of
// them; flat ones 62 TiB, vSphere's limit. A seSparse extent cannot grow. It is written as
// long as 2 TiB of it are in use at most; before the first change its tables and its back map
// are read.
// Grains that were discarded are punched out of the file, but when the image is closed
// before they are used again, their place in the file is lost: the format has no map of
// free space. It is found again when the image is opened once a fifth of the file or more
// must be lost. A resized image's old directories are lost likewise. Before the first
// change after opening all grain tables are read, to find shared grains: 128 MiB for 2 TiB
// in grains of 64 KiB that are all in use. A check needs a bitmap of the file: at most
// 64 MiB, or the check says so. A repair copies at most 1 GiB of shared grains. Parents are
// VMDKs only.
package vmdk

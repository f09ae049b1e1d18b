// Package vhdx is Microsoft's virtual hard disk format, version 2: "[MS-VHDX]: Virtual Hard
// Disk v2 (VHDX) File Format"; section numbers below are its.
//
//	format.go     the format's name and probing
//	open.go       from a file to an image
//	header.go     header section (2.2): file type identifier, headers, region tables
//	metadata.go   metadata region (2.6): sizes, flags, the parent locator
//	log.go        the log (2.3): finding and writing entries
//	replay.go     a file as its log says that it has to become
//	image.go      what the engine asks of an image
//	bat.go        the block allocation table (2.5): where a guest byte is
//	bitmap.go     sector bitmaps of differencing images (2.4)
//	change.go     reserving space, changing table and bitmaps
//	usage.go      going through the whole table: which space is in use
//	commit.go     first change, commit, clean close
//	resize.go     other sizes; moving the table
//	parent.go     what a differencing image stands on
//	setparent.go  changing that
//	check.go      checking and repairing
//	describe.go   what `image info` shows
//	create.go     making new images
//
// # What is supported
//
// Read and written: dynamic, fixed and differencing images, blocks of 1 to 256 MiB, logical
// sectors of 512 and 4096 bytes, all states of blocks. Logs are replayed, in memory until
// the image is first changed, so that an image opened for reading stays as it is.
//
// A fixed image's blocks keep their place: what is zeroed or discarded becomes a hole. In
// others it becomes "zero", and its place is used again.
//
// A parent is VHDX, named relative to its child. Absolute paths are of another machine: of
// those, the last part is looked for beside the child. Whatever the path says, the parent's
// data write GUID must be the one that the child was made on.
//
// Refused, each with a sentence that names it: other versions; required regions and
// metadata items that are unknown; regions, log or table outside the file or overlapping;
// logs of more than 32 MiB that are in use (or would be: with an empty one, an image is only
// read); log entries that change headers or the log, zero more than
// 1 GiB, lengthen the file by more than 16 GiB, or were written for a longer file. An image
// with two owners of one place, or entries that point outside the file or into metadata, is
// only read; what it says of the places concerned, not even that.
//
// # Choices where writers and readers differ
//
// Two headers with equal sequence numbers are accepted if they are equal (Disk2VHD).
//
// Regions are marked as required, as the specification wants: VirtualBox opens no others,
// and QEMU does not mark them.
//
// The entry of a block that is not present, or zero, has no file offset: Hyper-V reads no
// others. A block that was unmapped may keep its place: the place is not used for others
// until the block is written to.
//
// Log entries of ours are their own tails, and start at two places of the log in turn: the
// specification calls a log without any intact entry corrupt, so one must stay while the
// next is written. There is a gap behind each, because QEMU 7.2 takes any intact entry that
// follows another at once for its successor. A log of others' without any intact entry is
// taken for empty: QEMU leaves such.
//
// A block that is not present in a base may read as anything. What was zeroed or discarded
// there is marked as zero.
//
// # Why crashes are harmless
//
// The engine has data durable before a commit writes tables. A commit writes the 4 KiB
// sectors that changed into one log entry, syncs, writes them in place, and syncs before
// the next one is written. A crash leaves an entry that is not intact, and tables
// that were not touched; or one that is, and makes good whatever a crash left of the tables,
// in our replay as in others'. All changes of a commit become durable together.
//
// If one entry cannot hold them, they are written in several rounds, in an order that is
// safe at every step: bitmaps, which do not count until the table says that their block is
// partially present; then the table from its end, because a bitmap's entry comes after
// those of its blocks. A block that is given back does not become partially present at
// another place until that is durable: until then it gets new space as a whole.
//
// An entry says how long the file is, durably: it is synced before where the changes refer
// to what may be new.
//
// The first change applies what is in the log, voids that, writes an entry without changes,
// and then both headers, one after the other, with new GUIDs, the log's among them. A clean close writes them
// with no log GUID, which is what others open without replay.
//
// A resize makes a longer table at another place where nothing refers to it; one log entry
// changes both region tables and the size. Another parent likewise: the locator is written
// where nothing refers to it, one log entry changes the metadata table and the flags.
//
// # Limits
//
// Files of more than 256 TiB are only read. Which space is free is found by reading the
// whole table before the first change. Sector bitmaps stay when nothing needs
// them any more. Zeroing a part of a differencing image's block writes zeroes; only whole
// blocks become "zero". A child gets the disk ID of its parent, but none of the metadata
// items that users may have added there.
package vhdx

// Package vhd is Microsoft's "Virtual Hard Disk Image Format Specification", version 1.0
// (2006); section names below are its. Its name among the formats is "vpc", as qemu-img
// calls it.
//
//	format.go    the format's name and probing
//	footer.go    the footer, sizes and geometries ("Hard Disk Footer Format")
//	header.go    the second structure ("Dynamic Disk Header Format")
//	open.go      from a file to an image: which footer counts
//	parent.go    differencing images: links, UUID and time of the parent
//	image.go     block allocation table and bitmaps: who holds a guest byte
//	change.go    changing them
//	room.go      what of the file is in use: allocation, first change, clean close
//	scan.go      reading the whole table
//	pack.go      moving blocks into gaps
//	resize.go    growing and shrinking; other places for header and table
//	fixed.go     fixed images: moving the only footer
//	check.go     checking and repairing
//	describe.go  what `image info` shows
//	create.go    making new images
//
// # What is supported
//
// Read and written: fixed, dynamic and differencing images, with blocks of 512 bytes to
// 256 MiB; footers of 511 bytes, which are replaced. Created: all three kinds, up to 2040
// GiB, with blocks of 4 KiB and more; Microsoft's programs want 512 KiB or 2 MiB, the
// default.
//
// Refused, each with a sentence that names it: other versions and types, a damaged header,
// which exists only once, a table of more than 2^24 entries, parents that no link leads to.
//
// # Sizes
//
// Virtual PC shows its guests the size that the geometry has, which is a little less than
// the one in the footer. Other programs use the latter. Who made the image decides, as its
// creator field says: see guestBytes. What we make or resize says "win ", which everybody
// takes to mean that the footer's size counts.
//
// # Which footer counts
//
// A fixed image has one, at the end, and that it has: the start is the guest's, who can
// write anything there. Others have a copy at the start as well, which never moves, and
// that QEMU goes by. So do we. If it is damaged, the one at the end serves.
//
// # Bitmaps
//
// Each block has a bitmap of the sectors that are present. In a differencing image others
// are the parent's, so a granule is a sector there. In other images they are zero; but QEMU
// takes no notice of their bitmaps, so blocks that we add to them are present as a whole,
// with zeroes, and in blocks that other programs left partly present no bit is cleared.
//
// There is no state that says zero: where a parent's data would show through, zeroes are
// written, or holes punched.
//
// # Parents
//
// A child notes its parent's UUID, which never changes, a time, and links. We write a
// relative link (W2ru) and the bare name. Links are followed inside the store only; of
// absolute ones the last part is looked for beside the child. The first that leads to an
// image with the UUID counts. Our first change of an image after opening sets the time in
// its footer; a parent whose time is later than the one its child noted is refused.
//
// # Why crashes are harmless
//
// The engine has data durable before a commit writes tables. A commit writes bitmaps and
// syncs before it writes entries, so each entry on disk names a block with its bitmap and
// contents. Bitmaps of blocks behind all others are written with the data, before any entry
// names them. Space that a change frees is used again only after the change is durable.
//
// Blocks go behind all others, where the footer is. The file is made longer ahead of its
// use, with a new footer at its new end; the old one stays where it is, and blocks avoid
// it. Should power fail before the new one is durable, the file may end with neither: then
// the copy at the start counts, for us and for QEMU, and the next change or a repair puts
// another one at the end. The same footer, no entry refers to what was lost.
//
// Growing beyond the table, and changing the parent, write another header and table behind
// everything else, sync, and then name them in the footers, the one at the start first.
// Both are single sectors, and what either names is whole. The table comes last in the
// file, because QEMU adds blocks behind the table and other blocks and knows of nothing
// else that could be there. A differencing image that becomes a base has the sectors that
// are not present zeroed first, while no program reads them.
//
// A fixed image that grows gets a second footer with the old size at its new end; then the
// first one, which no program sees any more, is zeroed; then the second one's size is
// changed; with a sync between each two. Should power fail before the second one is
// durable, the file may end with zeroes, and we find the first one before them, and cut
// them off: only then other programs open the image again.
//
// # Limits
//
// Entries end at 2 TiB in the file. Space that was discarded is punched out of the file; the
// format has no map of it, but the next opening finds it in the table. Old headers and
// tables are found likewise once they are as large as a block. Shrinking and repairing move
// the last blocks into such gaps. A check compares what
// tables say; it does not look for sectors that should be present.
package vhd

// Package vdi is VirtualBox's disk image format, version 1.1. It has no specification;
// what is known of it comes from images that VirtualBox wrote, and from QEMU's notes.
//
//	format.go    the format's name and probing
//	header.go    the first sector, and what is refused
//	open.go      from a file to an image
//	parent.go    differencing images: UUIDs, and finding the parent by them
//	image.go     the block map: who holds a guest byte, changing it
//	room.go      which blocks of the file are in use: allocation, first change, clean close
//	scan.go      reading the whole block map
//	resize.go    growing and shrinking, moving blocks and the map
//	check.go     checking and repairing
//	describe.go  what `image info` shows
//	create.go    making new images
//
// # Layout
//
// A header sector names a map of 32-bit entries, one for each block of the guest, and the
// place where blocks begin. An entry is the index of a block in the file, or says that the
// block was never written (ask the parent) or is zero. The header counts the allocated
// blocks, and that count is also where other programs put the next one: entries are always
// a permutation of the first so many indexes, with no gaps. Blocks may be preceded by extra
// bytes, which are kept.
//
// # What is supported
//
// Read and written: dynamic, static and differencing images; blocks of 512 bytes to 64 MiB,
// with extra bytes or without; odd sizes, which count as whole sectors; larger headers.
// Created: all three kinds, with blocks of 4 KiB and more. QEMU and 7-Zip read blocks of
// 1 MiB only, and no differencing images.
//
// Refused, each with a sentence that names it: other versions, undo images, sectors other
// than 512 bytes, map or blocks that are not at whole sectors, parents that are not found.
//
// # Parents
//
// A child names its parent by UUID, and by the UUID of the parent's last change: no file
// name. We note a relative link in the comment of children that we make, and else look at
// the headers of at most 1024 files in the child's directory. One with both UUIDs is the
// parent; one with only the first was written to since, and is refused when the chain is
// opened; none or several are refused at once.
//
// # Blocks keep their place
//
// Once allocated, a block keeps its place in the file: zeroing and discarding punch holes
// into it, which gives the space back and leaves entries and count alone. Freeing it
// instead would leave a gap below the count, and other programs have no notion of gaps.
// Only shrinking and repairing move blocks, to close such gaps.
//
// # Why crashes are harmless
//
// The engine has data durable before a commit writes tables. A commit writes the count
// first and syncs it, then the entries. So each entry on disk names a block whose contents
// are durable and which the count covers: no other program takes it for free. What a crash
// leaves is a count that is too high, or blocks behind all others that nothing refers to;
// the next change of the image, or a repair, corrects the one and cuts off the other.
// Nobody else needs that: qemu-img check calls a high count an error, but QEMU and
// VirtualBox open the image, read it and add blocks as ever.
//
// The first change after opening writes another modification UUID, with the header's other
// fields one sector. Growing appends empty entries, syncs, and writes the header. Where the
// map has no room, the first blocks are copied to the end of the file, synced, and their
// entries changed; then a larger map goes where they were, whose entries count from behind
// it; then the header names both new places. Shrinking frees the entries past the new size,
// moves blocks the same way into what became free, and writes the header. A static image
// without room in its map has, for the moment of such a move, indexes as high as its number
// of blocks, which VirtualBox would refuse should power fail just then.
//
// # Limits
//
// An image has at most 2^29-128 blocks: 512 TiB with the usual blocks of 1 MiB. The map must
// end below 4 GiB in the file. On stores that cannot punch holes, discards give no space
// back.
package vdi

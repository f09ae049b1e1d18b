// Package qcow is version 1 of QEMU's copy-on-write format. It has no specification but the
// programs that read and write it; versions 2 and 3 are another format, qcow2.
//
//	format.go   the format's name and probing
//	open.go     from a file to an image, and what is refused
//	header.go   the first 48 bytes
//	image.go    the engine's Codec: what is not in the files below
//	mapping.go  both levels of tables: who holds a guest byte; sort.go puts tables in order
//	change.go   changing level 2 tables, and adding missing ones
//	compress.go compressed clusters
//	scraps.go   free space in pieces smaller than a cluster
//	resize.go   growing and shrinking
//	parent.go   changing the backing file
//	check.go    checking; stored.go is about compressed clusters, bitmap.go what is used
//	repair.go   repairing
//	reclaim.go  finding lost space
//	create.go   making new images, and measuring them
//
// # On disk
//
// A header of 48 bytes, big-endian as everything is; after it, as a rule, the backing file's
// name, and then the level 1 table, an array of file offsets of level 2 tables. Those are
// arrays of entries, one for each cluster: 0 if the image does not hold it, the file offset of
// a plain cluster, or, with bit 63 set, offset and length of a compressed one: a raw deflate
// stream, at any byte. There is no map of free space; new clusters go to the end of the file.
//
// # What is supported
//
// Everything that the format has: clusters of 512 bytes to 64 KiB, level 2 tables of 512 bytes
// to 64 KiB, backing files, compressed clusters, and AES-CBC encryption of the others. Guest
// sizes are taken to the byte; QEMU leaves the end of one that is no multiple of 512 out.
//
// Refused, each with a sentence that names it: a level 1 table of more than 32 MiB, backing
// files outside the store, encryption without a password. A wrong password cannot be told: the
// contents are noise then.
//
// An entry is followed only to where data can be: within the file, at a sector if it is of a
// plain cluster, neither in tables nor in the rest of the cluster in which the level 1 table or
// the backing file's name ends. Level 2 tables that lie outside the file, across sectors, or
// over anything else are not followed, and what they map cannot be used; the rest can.
//
// The backing file may be of any format. The image does not say of which: it has to be known
// from elsewhere (a volume's record, --backing-format), or is found out by looking, which a
// guest that wrote the backing file raw could abuse.
//
// # Why crashes are harmless
//
// The engine has data durable before a commit writes tables. A commit writes level 2 tables
// and syncs before it writes level 1 entries that name new ones. So at any moment each entry on
// disk is an old one or names what is durable. An old entry is no danger: the cluster it names
// is used again only after the change that freed it is durable. What a crash leaves is space
// that nothing refers to. Opening an image may find it again, by what the tables say then; a
// process that was killed may have left them written but not durable. Begin syncs the file
// before anything is written to what was found.
//
// Everything else is switched by the header, which lies in one sector, and no crash tears one:
// Resize first writes a larger level 1 table, SetParent a longer name, to space that nothing
// refers to. If the switch fails and cannot be undone, no commit succeeds any more.
//
// Begin puts a new time into the header's mtime, which QEMU never reads: an image has another
// identity after each session in which it was changed. QEMU does not change it, so a redo
// journal must be replayed before QEMU writes to an image, or removed; nothing can tell
// afterwards.
//
// # Limits
//
// The format cannot say that a cluster is zero. Over a parent, discarded clusters keep their
// place, as holes; if the image is encrypted, they keep their contents.
//
// Clusters that were freed are used again as long as the image is open. When it is closed
// before, those at the end of the file go, and others are lost. They are found again when the
// image is opened for writing once a fifth of the file or more, and 64 MiB, must be lost. A
// repair makes holes of them. It moves nothing: converting the image makes it short again.
//
// Entries that lead past the end of the file are found by a check, not by opening the image: of
// one that was damaged so, and is written to without a repair, the file grows to where they lead.
//
// A compressed cluster that is written to becomes a plain one. A file ends where entries of
// compressed clusters do: at 128 TiB with clusters of 64 KiB, further with smaller ones.
//
// A check holds a bitmap of the file, at most 64 MiB, and another one of the same size: a file
// of 2 TiB with clusters of 4 KiB, or it says so.
package qcow

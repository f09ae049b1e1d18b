// Package qcow2 is QEMU's image format QCOW2, versions 2 and 3, as QEMU's interoperability
// documentation specifies it ("qcow2"); section names below are that document's.
//
//	format.go      the format's name and probing
//	open.go        from files to an image: what is read at once, what is refused
//	header.go      the first cluster ("Header", "Header extensions")
//	parent.go      the backing file
//	image.go       what the engine asks of an image; the order of a commit
//	lookup.go      L1 and L2 tables: who holds a guest byte ("Cluster mapping")
//	subcluster.go  clusters of which parts are present ("Extended L2 Entries")
//	compress.go    compressed clusters, zlib and zstd
//	change.go      changing L2 tables, copying those that snapshots share
//	refcount.go    refcount table and blocks ("Host cluster management")
//	space.go       finding, taking and freeing host clusters
//	clusterset.go  where metadata is
//	begin.go       the first change after opening; replacing the header
//	resize.go      growing and shrinking
//	snapshot.go    internal snapshots ("Snapshots")
//	bitmap.go      persistent bitmaps ("Bitmaps")
//	counts.go, check.go, repair.go  checking and repairing
//	describe.go    what `image info` shows
//	options.go, create.go  making new images
//
// # What is supported
//
// Read and written: versions 2 and 3; clusters of 512 bytes to 2 MiB; refcounts of 1 to 64
// bits; zero clusters, plain and with a place; compressed clusters of zlib and zstd; extended
// L2 entries; external data files, raw ones too; backing files of every format known here;
// images with internal snapshots. All of it can be created, too, but for snapshots.
//
// Clusters that snapshots share are copied when they are written to, tables as well. The
// snapshots are listed and checked, and never changed.
//
// Refcounts are always written before what needs them, also in images that allow to leave
// them for later (lazy_refcounts), which stay so. An image that was left with its dirty bit
// set has its refcounts made right before the first change.
//
// Persistent bitmaps: those that track changes (auto) are marked as in use before the first
// change, because what is written here is missing from them: QEMU calls them inconsistent
// then, and uses them for nothing. Others stay good. When the disk gets another size, all are
// marked. If the directory cannot be understood, the autoclear bit is cleared, which says
// that none of the extension is to be trusted. Unknown autoclear bits are cleared.
//
// Compressed clusters are written by conversion only, one reference for each in every host
// cluster they share. Images with extended L2 entries get none.
//
// Refused, each with a sentence that names it: AES and LUKS encryption; incompatible features
// that are not known, by the names that the image's own table gives them; backing and data
// files that are absolute, URIs, or lie outside the store; damaged snapshot tables, because
// what they share could not be told. An image with the corrupt bit can be read; it is written
// to when it has been repaired.
//
// # Choices where readers differ
//
// The name of an external data file is relative to the image. QEMU takes it relative to its
// working directory.
//
// Data clusters of an external data file are reported as flat: zeroing and discard punch
// holes there and leave the mapping, so that a raw data file stays what the image says.
//
// # Identity
//
// Nothing in QCOW2 changes with every writer. So that a redo journal is replayed onto the
// image it was written for and no other, the first change after opening puts 16 random bytes
// into a header extension of its own type, 0x43534944, which the specification has others
// ignore and QEMU keeps. With them count the facts of the header that other programs change
// when they take snapshots, resize, rebase or convert. A program that only writes guest data
// into an image whose server has been killed, on the same node and before that server is
// started again, leaves no trace; the lock and the epoch of the attachment stand before that.
// Where the first cluster has no room for the extension, no journal is replayed.
//
// # Why crashes are harmless
//
// The engine has data durable before a commit writes tables. A commit has five stages, each
// durable before the next: refcount blocks; refcount tables; the header, if it names a new
// refcount table; L2 tables; L1 tables. So whatever an entry on disk refers to has a refcount,
// and tables are there before they are named. What loses a reference loses it in memory at
// once; its refcount is lowered only in the next commit (Free). A crash leaves refcounts that
// are too high, which is lost space that a check finds, never too low ones: no cluster has two
// owners that do not know of each other.
//
// A cluster or table whose bit 63 says that its refcount is one is written in place. All
// others are copied first, and the copy's entry has the bit.
//
// Begin, SetParent and Resize write one sector of the header, which no crash tears: it holds
// the header and all extensions. The backing file's name may lie behind it, and a new one is
// written to where the old one is not. A larger L1 table is written to space that nothing
// refers to, with its refcounts, before the header names it. Shrinking changes the header
// first, then L1 entries, then refcounts.
//
// Create writes the first sector last.
//
// # Repair
//
// A check counts every reference and compares. A repair makes refcounts and bit 63 say what
// was counted; where the refcounts' own structure is damaged or in the way, it makes a new one
// behind everything else and has the header name it. Guest clusters that lie where metadata
// or another guest cluster is get a copy of their own, and so do L2 tables that two L1 entries
// name: nothing that can be read is lost. Entries that point outside the file stay, and are an
// error for whoever reads there. The corrupt bit goes when nothing else is wrong.
//
// # Speed
//
// Opening reads the L1 table, at most 32 MiB, and no refcounts: they are looked through in
// pieces of 64 KiB as space is needed, from the beginning of the file, until free clusters
// turn up; meanwhile space is taken from the end of the file. What is known to be free is
// bounded, too: what is too much is forgotten and found again.
//
// # Limits
//
// Those of QEMU: 32 MiB of L1 table, 8 MiB of refcount table, 65536 snapshots. The set of
// metadata clusters, which guest data must not lie in, is complete up to 32 MiB of memory.
// A check needs a byte of memory for each host cluster, at most 256 MiB.
package qcow2

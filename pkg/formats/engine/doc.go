// Package engine is the one I/O engine that all image formats share: guest reads and
// writes, chains, copy-on-write, zeroing, discard, flush, the redo journal. A format
// is a [Codec]: it knows its tables, and nothing else.
//
// # Order of reading
//
//	codec.go    what a format must answer
//	layer.go    an open image: files, tables, codec, link to its parent
//	disk.go     a chain of layers as a block.Device
//	read.go     finding who holds a guest byte, and reading it; answering.go: remembering who
//	write.go    overwriting in place; allocating; copy-on-write
//	zero.go     zeroing and discard
//	resize.go   growing and shrinking
//	chain.go    pulling parents up, exchanging them; hold.go: the same for what is copied
//	compress.go compressed granules, for conversion
//	claims.go   who is allocating which guest range; lock.go: the lock of mappings
//	flush.go    one flush for many callers; poisoning
//	commit.go   how changes of tables reach the disk, in which order
//	tables.go   the cache of table sectors
//	journal.go  the redo journal
//	space.go    the allocator of formats that append
//
// # Locks
//
// From outer to inner; none is held while waiting for an outer one.
//
//	gate     shared: any guest request; exclusive: switching layers, resizing, and
//	         making sure that nobody still uses space about to be reused
//	claims   a range of guest bytes that one request is allocating
//	mapping  shared: Lookup; exclusive: every other method of a Codec. Data is never
//	         read or written under it
//	tables   the cache's own, innermost
//
// # How a write keeps the promises
//
// Bytes that have a place are overwritten there. For others a place is reserved, the
// data is written to it, with what surrounds it in its granule, and only then the
// mapping is changed in memory, noted in the journal, and the write completes (P1).
// Nothing on disk refers to the new place until a flush: it syncs the data first and
// then has the codec commit the tables in its format's safe order (P2, P3). Space that
// a change frees is used again only after the change is durable and every request that
// could have seen the old mapping has ended.
//
// # How formats fit
//
//	raw     one Run for everything; nothing to commit.
//	vmdk    Lookup walks directory and table; redundant tables are a second Tables
//	        write. Several extent files are several Files; flat and sparse ones mix,
//	        because Lookup and Granule answer in bytes. streamOptimized grains are
//	        Compressed runs.
//	vhdx    the BAT is a table. Commit writes the dirty sectors into the log, syncs,
//	        writes them in place, syncs; Begin writes the headers with new GUIDs; Finish
//	        empties the log. A differencing disk's sector bitmap makes Lookup answer
//	        in sectors: a block that has space but lacks a sector is Absent there, its
//	        Granule is a sector, and Allocate returns the place the block already has.
//	        The file of an image with a dirty log shows what the log says; the first
//	        change writes that.
//	vdi     the block map is a table; discarded blocks are Zero runs.
//	qcow    two-level tables; compressed clusters are Compressed runs; encryption is a
//	        Cipher.
//	qcow2   Allocate raises refcounts (stage 0), Set writes L2 entries (stage 1), Free
//	        lowers refcounts, in the next commit: a crash can leak a cluster, never
//	        share one. Subclusters make Granule smaller than a cluster. An external data
//	        file is another File. Compressed writes Set a place with a compressed length.
//	vhd     the BAT is a table; a block's sector bitmap is a table too.
package engine

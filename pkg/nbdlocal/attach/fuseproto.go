package attach

// The part of the FUSE wire protocol (include/uapi/linux/fuse.h, version 7.40) that
// one regular file under a loop device needs. All fields are in the machine's byte
// order and at fixed offsets; the structures are read and written in place.

const (
	fuseMajor = 7
	// fuseMinor is what we speak. Linux 6.9, the first that resends (7.40), is also
	// the oldest that Probe accepts, so no older layout has to be understood.
	fuseMinor = 40

	fuseRootNode = 1 // the directory
	fuseFileNode = 2 // the one file in it, whatever name is looked up

	fuseInHeaderBytes  = 40
	fuseOutHeaderBytes = 16
	fuseWriteInBytes   = 40 // as is fuse_read_in

	// fuseMaxRequestBytes is the most data one request carries: max_write and
	// max_pages of INIT. Larger ones, up to the 1 MiB the kernel allows, were
	// measured to be no faster, and every thread has a resident buffer of this
	// size. It is fixed for a connection's life, and a connection outlives the
	// servers that serve it: a successor with smaller buffers could not read its
	// requests.
	fuseMaxRequestBytes = 256 << 10
)

// fuse_opcode
const (
	fuseLookup      = 1
	fuseForget      = 2
	fuseGetattr     = 3
	fuseOpen        = 14
	fuseRead        = 15
	fuseWrite       = 16
	fuseStatfs      = 17
	fuseRelease     = 18
	fuseFsync       = 20
	fuseFlush       = 25
	fuseInit        = 26
	fuseInterrupt   = 36
	fuseDestroy     = 38
	fuseBatchForget = 42
	fuseFallocate   = 43
)

// fuse_in_header
const (
	inLen    = 0  // u32, of the whole request
	inOpcode = 4  // u32
	inUnique = 8  // u64
	inNode   = 16 // u64
)

// fuse_out_header
const (
	outLen    = 0 // u32, of the whole reply
	outError  = 4 // i32, negative errno; of a notification, its code
	outUnique = 8 // u64; of a notification, 0
)

// fuse_init_in, fuse_init_out and their flags
const (
	initInMajor  = 0  // u32
	initInMinor  = 4  // u32
	initInFlags  = 12 // u32
	initInFlags2 = 16 // u32, the flags' upper half
	initInBytes  = 64

	initOutMajor         = 0  // u32
	initOutMinor         = 4  // u32
	initOutMaxReadahead  = 8  // u32
	initOutFlags         = 12 // u32
	initOutMaxBackground = 16 // u16
	initOutCongestion    = 18 // u16
	initOutMaxWrite      = 20 // u32
	initOutTimeGran      = 24 // u32
	initOutMaxPages      = 28 // u16
	initOutBytes         = 64

	initAsyncRead = 1 << 0
	initBigWrites = 1 << 5
	initAsyncDIO  = 1 << 15
	initMaxPages  = 1 << 22
	initExt       = 1 << 30 // flags2 counts

	initFlags2HasResend = 1 << (39 - 32)
)

// fuse_attr, within fuse_attr_out and fuse_entry_out
const (
	attrIno     = 0  // u64
	attrSize    = 8  // u64
	attrBlocks  = 16 // u64, of 512 bytes
	attrMode    = 60 // u32
	attrNlink   = 64 // u32
	attrBlksize = 80 // u32
	attrBytes   = 88

	attrOutValid = 0 // u64, seconds
	attrOutAttr  = 16
	attrOutBytes = attrOutAttr + attrBytes

	entryOutNode       = 0  // u64
	entryOutEntryValid = 16 // u64, seconds
	entryOutAttrValid  = 24 // u64, seconds
	entryOutAttr       = 40
	entryOutBytes      = entryOutAttr + attrBytes
)

// fuse_open_out
const (
	openOutFlags = 8 // u32
	openOutBytes = 16

	openDirectIO       = 1 << 0
	openNoFlush        = 1 << 5
	openParallelWrites = 1 << 6
)

// fuse_read_in and fuse_write_in share their head; fuse_write_out
const (
	ioOff  = 8  // u64
	ioSize = 16 // u32

	writeOutSize  = 0 // u32
	writeOutBytes = 8
)

// fuse_fallocate_in
const (
	fallocateOff   = 8  // u64
	fallocateLen   = 16 // u64
	fallocateMode  = 24 // u32
	fallocateBytes = 32
)

// fuse_statfs_out
const (
	statfsBlocks   = 0  // u64
	statfsBsize    = 40 // u32
	statfsNamelen  = 44 // u32
	statfsFrsize   = 48 // u32
	statfsOutBytes = 80
)

// Notifications: messages from the server that answer nothing.
const (
	notifyStore  = 4
	notifyResend = 7

	storeNode  = 0  // u64
	storeOff   = 8  // u64
	storeSize  = 16 // u32
	storeBytes = 24 // the data follows
)

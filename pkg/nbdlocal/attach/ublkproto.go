package attach

import "unsafe"

// The kernel's ublk driver (include/uapi/linux/ublk_cmd.h): control commands to
// /dev/ublk-control by io_uring with entries of 128 bytes, and per device and queue
// commands to /dev/ublkcN, each of which hands in a result and waits for a request.

// Numbers of commands are those of ioctls: direction, size of the argument, letter,
// number.
const (
	ublkRead      = 2<<30 | ublkControlBytes<<16 | 'u'<<8
	ublkReadWrite = 3<<30 | ublkControlBytes<<16 | 'u'<<8

	ublkAddDev        = ublkReadWrite | 0x04
	ublkDelDev        = ublkReadWrite | 0x05
	ublkStartDev      = ublkReadWrite | 0x06
	ublkStopDev       = ublkReadWrite | 0x07
	ublkSetParams     = ublkReadWrite | 0x08
	ublkStartRecovery = ublkReadWrite | 0x10
	ublkEndRecovery   = ublkReadWrite | 0x11
	ublkGetDevInfo    = ublkRead | 0x02
	ublkGetFeatures   = ublkRead | 0x13
	ublkDelDevAsync   = ublkRead | 0x14
	ublkUpdateSize    = ublkReadWrite | 0x15
	ublkTryStopDev    = ublkReadWrite | 0x17

	ublkIOReadWrite    = 3<<30 | ublkIOCommandBytes<<16 | 'u'<<8
	ublkFetch          = ublkIOReadWrite | 0x20
	ublkCommitAndFetch = ublkIOReadWrite | 0x21
)

// Features of the driver, and flags of a device.
const (
	ublkUserRecovery    = 1 << 3 // requests wait while there is no server
	ublkRecoveryReissue = 1 << 4 // also those that a dead one had taken
	ublkIoctlEncode     = 1 << 6
	ublkHasUpdateSize   = 1 << 10
	ublkHasQuiesce      = 1 << 12
	ublkHasTryStop      = 1 << 17
	ublkNoPartScan      = 1 << 18
)

// States of a device.
const (
	ublkDead     = 0
	ublkLive     = 1
	ublkQuiesced = 2
)

// ublkControl is struct ublksrv_ctrl_cmd.
type ublkControl struct {
	Dev     uint32
	Queue   uint16 // ublkNoQueue
	Len     uint16
	Addr    uint64
	Data    uint64
	PathLen uint16
	_       uint16
	_       uint32
}

const (
	ublkControlBytes = 32
	ublkNoQueue      = 0xffff
)

// ublkDevInfo is struct ublksrv_ctrl_dev_info.
type ublkDevInfo struct {
	Queues, Depth uint16
	State         uint16
	_             uint16
	MaxIOBytes    uint32
	Dev           uint32
	ServerPID     int32
	_             uint32
	Flags         uint64
	ServerFlags   uint64 // the driver keeps them and does nothing with them
	UID, GID      uint32
	_, _          uint64
}

// ublkParams is the part of struct ublk_params that is set here.
type ublkParams struct {
	Len   uint32
	Types uint32
	Basic struct {
		Attrs         uint32
		LogicalShift  uint8
		PhysicalShift uint8
		OptShift      uint8
		MinShift      uint8
		MaxSectors    uint32
		ChunkSectors  uint32
		DevSectors    uint64
		VirtBoundary  uint64
	}
	Discard struct {
		Alignment        uint32
		Granularity      uint32
		MaxSectors       uint32
		MaxZeroesSectors uint32
		MaxSegments      uint16
		_                uint16
	}
}

const (
	ublkParamsBytes = 60 // unsafe.Sizeof would count padding at the end

	ublkTypeBasic   = 1 << 0
	ublkTypeDiscard = 1 << 1

	ublkReadOnly      = 1 << 0
	ublkVolatileCache = 1 << 2
	ublkFUA           = 1 << 3
)

// ublkIOCommand is struct ublksrv_io_cmd.
type ublkIOCommand struct {
	queue  uint16
	tag    uint16
	result int32  // of a commit
	addr   uint64 // the buffer that the next request's data goes to or comes from
}

const ublkIOCommandBytes = 16

// ublkDesc is struct ublksrv_io_desc: a request, in memory that the driver writes.
type ublkDesc struct {
	opFlags     uint32 // lowest byte: operation
	sectors     uint32
	startSector uint64
	addr        uint64
}

const (
	ublkDescBytes = 24

	ublkOpRead        = 0
	ublkOpWrite       = 1
	ublkOpFlush       = 2
	ublkOpDiscard     = 3
	ublkOpWriteZeroes = 5

	ublkFlagFUA     = 1 << 13
	ublkFlagNoUnmap = 1 << 15
)

// Sizes that the kernel relies on.
var (
	_ [ublkControlBytes]byte   = [unsafe.Sizeof(ublkControl{})]byte{}
	_ [64]byte                 = [unsafe.Sizeof(ublkDevInfo{})]byte{}
	_ [64]byte                 = [unsafe.Sizeof(ublkParams{})]byte{}
	_ [ublkIOCommandBytes]byte = [unsafe.Sizeof(ublkIOCommand{})]byte{}
	_ [ublkDescBytes]byte      = [unsafe.Sizeof(ublkDesc{})]byte{}
)

// What the transport and every server, of whatever version, agree on without a word: a
// device outlives its servers, and the descriptor is all that they are handed. A change
// needs a protocol of another name.
const (
	// ublkDepth is how many requests of a queue can be in flight.
	ublkDepth = 128
	// ublkMaxRequestBytes is the most data of a request, and so the size of each of
	// its buffers.
	ublkMaxRequestBytes = 1 << 20
	// ublkDescStride is from one queue's descriptors to the next's in the device's
	// mapping: what 4096 of them take, however many there are.
	ublkDescStride = 4096 * ublkDescBytes
	sectorBytes    = 512
)

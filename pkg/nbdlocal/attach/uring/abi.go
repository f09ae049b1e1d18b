package uring

import "unsafe"

// The kernel's interface: include/uapi/linux/io_uring.h. It is the same on all
// architectures that are little endian.

// Op is an operation.
type Op uint8

// The operations that are used here.
const (
	OpNop         Op = 0
	OpAsyncCancel Op = 14
	OpRead        Op = 22
	OpCommand     Op = 46 // IORING_OP_URING_CMD
)

// SQE is struct io_uring_sqe: one operation to carry out. The command follows on the last
// 16 bytes in entries of 128 bytes, which Command returns.
type SQE struct {
	Op       Op
	Flags    uint8
	Priority uint16
	FD       int32
	Off      uint64 // of a command, its number in the lower half
	Addr     uint64
	Len      uint32
	OpFlags  uint32
	UserData uint64 // comes back with the completion
	bufIndex uint16
	personal uint16
	spliceFD int32
	command  [16]byte
}

// ownPosition makes a read use the file's own position, or none where it has none.
const ownPosition = ^uint64(0)

// Read fills the entry with a read of len(p) bytes at the file's own position. p must not
// be memory of the garbage collector's.
func (e *SQE) Read(fd int, p []byte, userData uint64) {
	e.Op, e.FD, e.Off = OpRead, int32(fd), ownPosition
	e.Addr, e.Len, e.UserData = uint64(uintptr(unsafe.Pointer(&p[0]))), uint32(len(p)), userData
}

// Nop fills the entry with nothing to do.
func (e *SQE) Nop(userData uint64) { e.Op, e.FD, e.UserData = OpNop, -1, userData }

// Cancel fills the entry with the cancellation of what was submitted with target.
func (e *SQE) Cancel(target, userData uint64) {
	e.Op, e.FD, e.Addr, e.UserData = OpAsyncCancel, -1, target, userData
}

// Command fills the entry with a command to the driver behind fd and returns where the
// command's own bytes go: 16 of them, or in wide entries 80.
func (e *SQE) Command(fd int, number uint32, userData uint64) unsafe.Pointer {
	e.Op, e.FD, e.Off, e.UserData = OpCommand, int32(fd), uint64(number), userData
	return unsafe.Pointer(&e.command)
}

// params is struct io_uring_params.
type params struct {
	sqEntries, cqEntries uint32
	flags                uint32
	threadCPU            uint32
	threadIdle           uint32
	features             uint32
	workers              uint32
	reserved             [3]uint32
	sq                   sqOffsets
	cq                   cqOffsets
}

type sqOffsets struct {
	head, tail, ringMask, ringEntries, flags, dropped, array, reserved uint32
	address                                                            uint64
}

type cqOffsets struct {
	head, tail, ringMask, ringEntries, overflow, cqes, flags, reserved uint32
	address                                                            uint64
}

// restriction is struct io_uring_restriction.
type restriction struct {
	kind     uint16
	op       uint8
	reserved [13]byte
}

// Sizes that the kernel relies on.
var (
	_ [64]byte  = [unsafe.Sizeof(SQE{})]byte{}
	_ [120]byte = [unsafe.Sizeof(params{})]byte{}
	_ [16]byte  = [unsafe.Sizeof(Completion{})]byte{}
	_ [16]byte  = [unsafe.Sizeof(restriction{})]byte{}
)

const (
	maxEntries = 4096
	cqeBytes   = 16

	setupDisabled     = 1 << 6
	setupSQE128       = 1 << 10
	setupSingleIssuer = 1 << 12
	setupDeferTaskrun = 1 << 13

	featureSingleMapping = 1 << 0
	featureWaitArgument  = 1 << 8

	offRings = 0
	offSQEs  = 0x10000000

	enterGetEvents        = 1 << 0
	enterExtendedArgument = 1 << 3

	registerRestrictions = 11
	registerEnableRings  = 12
	restrictSQEOp        = 1
)

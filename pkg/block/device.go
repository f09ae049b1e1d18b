package block

// Device is a virtual disk.
//
// Offsets and lengths are bytes; any alignment is accepted. A range must lie
// within [0, Info().SizeBytes): others fail with [ErrOutOfRange] and do nothing.
// All methods except Close are safe for concurrent use, and requests that do not
// overlap do not wait for one another. Requests that overlap and run at the same
// time are ordered arbitrarily, byte by byte.
//
// After a failed Flush, or any failure that leaves a Device unable to say what is
// durable, every later write and flush fails with [ErrPoisoned] until the image is
// opened anew.
type Device interface {
	// ReadAt fills p with the bytes at off. It returns len(p) and nil, or an
	// error and how many leading bytes of p are valid; never io.EOF. p is the
	// caller's and is not kept.
	ReadAt(p []byte, off int64) (int, error)

	// WriteAt writes p at off. It returns len(p) and nil; on an error any part of
	// the range may hold the new or the old bytes. What was written is visible at
	// once (P1) and durable after the next Flush. p is not kept.
	WriteAt(p []byte, off int64) (int, error)

	// WriteZeroes makes [off, off+n) read as zeroes, with the visibility and
	// durability of WriteAt. Without flags it may give space back.
	WriteZeroes(off, n int64, flags ZeroFlags) error

	// Discard says that the contents of [off, off+n) are no longer needed. They
	// may be kept or become zeroes, byte by byte; a parent layer's data never
	// shows through. It is advice: a device that cannot free space returns nil.
	Discard(off, n int64) error

	// Flush returns once every write, zeroing and discard that had returned when
	// Flush was called is durable (P2). Concurrent calls may share one sync.
	Flush() error

	// Map describes the run of bytes with one state that starts at off, at most n
	// bytes long. The answer is a snapshot: a concurrent write may outdate it.
	Map(off, n int64) (Extent, error)

	// Info describes the device as it is now. SizeBytes may grow during its life.
	Info() Info

	// Close makes everything durable, as Flush does, and releases what the device
	// holds. No other call may be running or follow. It always releases; an error
	// says that something written may not be durable.
	Close() error
}

// ZeroFlags modify WriteZeroes.
type ZeroFlags uint32

const (
	// ZeroKeepAllocated asks that the range's space stay (or become) allocated,
	// so that later writes to it need no more: NBD's NO_HOLE.
	ZeroKeepAllocated ZeroFlags = 1 << iota
	// ZeroFastOnly asks to fail with ErrUnsupported where zeroing would cost as
	// much as writing the range: NBD's FAST_ZERO.
	ZeroFastOnly
)

// Info describes a device. It is data, so that wrappers pass on what they do not
// know.
type Info struct {
	SizeBytes         int64 // guest size; a multiple of 1, not necessarily of a block
	LogicalBlockBytes int   // 512 or 4096: what the guest addresses
	ClusterBytes      int64 // preferred alignment and size for allocation; 0 if none
	ReadOnly          bool  // WriteAt, WriteZeroes and Discard fail with ErrReadOnly
	CanDiscard        bool  // Discard can give space back
	CanZero           bool  // WriteZeroes can be faster than writing zeroes
}

// State is what a run of guest bytes is made of.
type State uint8

const (
	// Unallocated: no layer holds the bytes; they read as zeroes.
	Unallocated State = iota
	// Zero: a layer says explicitly that the bytes are zeroes.
	Zero
	// Data: a layer holds the bytes.
	Data
)

// String returns the state's name in lower case.
func (s State) String() string {
	switch s {
	case Unallocated:
		return "unallocated"
	case Zero:
		return "zero"
	case Data:
		return "data"
	}
	return "invalid"
}

// Extent is a run of guest bytes with one state.
type Extent struct {
	Off, Len   int64 // guest bytes [Off, Off+Len)
	State      State
	Depth      int    // which layer answers, 0 = top; meaningless if Unallocated
	Compressed bool   // the data is stored compressed
	File       string // the file that holds the data, "" if none or not one
	FileOff    int64  // file offset of Off in File; -1 if there is no plain mapping
}

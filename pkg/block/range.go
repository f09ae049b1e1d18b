package block

import "fmt"

// CheckRange returns nil when [off, off+n) lies within [0, size), and an error that
// wraps ErrOutOfRange and names all three otherwise. It does not overflow.
func CheckRange(off, n, size int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("range of %d bytes at %d: %w of %d bytes", n, off, ErrOutOfRange, size)
	}
	return nil
}

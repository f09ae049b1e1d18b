package block

import (
	"errors"
	"fmt"
	"io"
	"syscall"
	"testing"
)

func TestErrno(t *testing.T) {
	for _, c := range []struct {
		err  error
		want syscall.Errno
	}{
		{nil, 0},
		{fmt.Errorf("vmdk: write grain at 0x1000: %w", ErrNoSpace), syscall.ENOSPC},
		{fmt.Errorf("write: %w", syscall.EDQUOT), syscall.ENOSPC},
		{errors.Join(ErrPoisoned, ErrNoSpace), syscall.EIO},
		{ErrReadOnly, syscall.EPERM},
		{ErrOutOfRange, syscall.EINVAL},
		{errors.ErrUnsupported, syscall.ENOTSUP},
		{io.ErrUnexpectedEOF, syscall.EIO},
	} {
		if got := Errno(c.err); got != c.want {
			t.Errorf("Errno(%v) = %v, want %v", c.err, got, c.want)
		}
	}
}

func TestCheckRange(t *testing.T) {
	for _, c := range []struct {
		off, n, size int64
		ok           bool
	}{
		{0, 0, 0, true}, {0, 10, 10, true}, {9, 1, 10, true}, {10, 0, 10, true},
		{0, 11, 10, false}, {11, 0, 10, false}, {-1, 1, 10, false}, {1, -1, 10, false},
		{1 << 62, 1 << 62, 10, false},
	} {
		err := CheckRange(c.off, c.n, c.size)
		if (err == nil) != c.ok || err != nil && !errors.Is(err, ErrOutOfRange) {
			t.Errorf("CheckRange(%d, %d, %d) = %v, want ok=%v", c.off, c.n, c.size, err, c.ok)
		}
	}
}

package block

import (
	"context"
	"errors"
	"io/fs"
	"syscall"
)

// Sentinels. Wrap them with what was being done and where; test with errors.Is.
var (
	ErrOutOfRange  = errors.New("outside the device")
	ErrReadOnly    = errors.New("read-only")
	ErrNoSpace     = errors.New("no space left on the store")
	ErrUnsupported = errors.New("not supported")
	ErrInvalid     = errors.New("invalid argument")
	ErrCorrupt     = errors.New("image is corrupt")
	ErrLocked      = errors.New("in use by another process")
	ErrPoisoned    = errors.New("an earlier flush failed; reopen the image")
	ErrFenced      = errors.New("fenced: another node owns the volume")
	ErrClosed      = errors.New("closed")
	ErrExists      = errors.New("already exists")
	ErrNotFound    = errors.New("not found")
	ErrBusy        = errors.New("busy")
)

// Errno translates err to the error number a kernel or an NBD client is told. It is
// the only place where error numbers are made. An unknown error is EIO.
func Errno(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	for _, e := range errnos {
		if errors.Is(err, e.sentinel) {
			return e.errno
		}
	}
	return syscall.EIO
}

var errnos = []struct {
	sentinel error
	errno    syscall.Errno
}{
	{ErrPoisoned, syscall.EIO}, // before what it may wrap
	{ErrFenced, syscall.EIO},
	{ErrCorrupt, syscall.EIO},
	{ErrNoSpace, syscall.ENOSPC},
	{syscall.ENOSPC, syscall.ENOSPC},
	{syscall.EDQUOT, syscall.ENOSPC},
	{ErrReadOnly, syscall.EPERM},
	{syscall.EROFS, syscall.EPERM},
	{ErrOutOfRange, syscall.EINVAL},
	{ErrInvalid, syscall.EINVAL},
	{ErrUnsupported, syscall.ENOTSUP},
	{errors.ErrUnsupported, syscall.ENOTSUP},
	{ErrClosed, syscall.ESHUTDOWN},
	{fs.ErrClosed, syscall.ESHUTDOWN},
	{context.Canceled, syscall.ESHUTDOWN},
	{ErrLocked, syscall.EBUSY},
	{ErrBusy, syscall.EBUSY},
	{ErrExists, syscall.EEXIST},
	{ErrNotFound, syscall.ENOENT},
	{syscall.ENOMEM, syscall.ENOMEM},
}

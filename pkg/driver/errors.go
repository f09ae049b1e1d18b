package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// ErrUnavailable says that a part the driver needs does not answer; trying again later
// is right.
var ErrUnavailable = errors.New("unavailable")

// Sentinels of the driver's own.
var (
	// errPending: another operation on the volume or snapshot has not ended.
	errPending = errors.New("an operation is pending")
	// errBadToken: a page's token is none that the driver gave.
	errBadToken = errors.New("invalid token")
	// errPrecondition: the volume is not in the state that the call needs.
	errPrecondition = errors.New("not possible now")
	// errPanic: a defect.
	errPanic = errors.New("internal error")
)

// grpcCodes translates sentinels, block's and the system's; the first that an error wraps
// decides. fs.ErrNotExist is not among them: that a file is missing does not say that
// what the call is about does not exist.
var grpcCodes = []struct {
	sentinel error
	code     codes.Code
}{
	{errPanic, codes.Internal},
	{block.ErrPoisoned, codes.Internal}, // before what it may wrap
	{block.ErrFenced, codes.FailedPrecondition},
	{block.ErrCorrupt, codes.DataLoss},
	{block.ErrNoSpace, codes.ResourceExhausted},
	{syscall.ENOSPC, codes.ResourceExhausted},
	{syscall.EDQUOT, codes.ResourceExhausted},
	{errPending, codes.Aborted},
	{errBadToken, codes.Aborted},
	{errPrecondition, codes.FailedPrecondition},
	{ErrUnavailable, codes.Unavailable},
	{block.ErrOutOfRange, codes.OutOfRange},
	{block.ErrExists, codes.AlreadyExists},
	{block.ErrNotFound, codes.NotFound},
	{block.ErrBusy, codes.FailedPrecondition},
	{block.ErrLocked, codes.FailedPrecondition},
	{block.ErrReadOnly, codes.FailedPrecondition},
	{syscall.EROFS, codes.FailedPrecondition},
	{block.ErrUnsupported, codes.InvalidArgument},
	{block.ErrInvalid, codes.InvalidArgument},
	{errors.ErrUnsupported, codes.InvalidArgument},
	{fs.ErrInvalid, codes.InvalidArgument},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{context.Canceled, codes.Canceled},
}

// toStatus makes the error that a caller sees. Unknown errors are Internal.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err // of grpc itself: a method that is not implemented
	}
	return status.Error(codeOf(err), err.Error())
}

func codeOf(err error) codes.Code {
	for _, c := range grpcCodes {
		if errors.Is(err, c.sentinel) {
			return c.code
		}
	}
	return codes.Internal
}

// expected reports whether an error is part of normal operation, for logs.
func expected(err error) bool {
	switch codeOf(err) {
	case codes.Internal, codes.DataLoss, codes.ResourceExhausted:
		return false
	}
	return true
}

// invalid describes a bad field of a request: what it is called, its value and what
// would be accepted.
func invalid(field string, value any, want string) error {
	return fmt.Errorf("%s %q: %w: want %s", field, fmt.Sprint(value), block.ErrInvalid, want)
}

// missing describes a field that a request lacks.
func missing(field string) error {
	return fmt.Errorf("%s is missing: %w", field, block.ErrInvalid)
}

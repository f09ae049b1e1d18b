package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

func TestToStatus(t *testing.T) {
	for sentinel, want := range map[error]codes.Code{
		block.ErrOutOfRange:      codes.OutOfRange,
		block.ErrReadOnly:        codes.FailedPrecondition,
		block.ErrNoSpace:         codes.ResourceExhausted,
		block.ErrUnsupported:     codes.InvalidArgument,
		block.ErrInvalid:         codes.InvalidArgument,
		block.ErrCorrupt:         codes.DataLoss,
		block.ErrLocked:          codes.FailedPrecondition,
		block.ErrPoisoned:        codes.Internal,
		block.ErrFenced:          codes.FailedPrecondition,
		block.ErrClosed:          codes.Internal,
		block.ErrExists:          codes.AlreadyExists,
		block.ErrNotFound:        codes.NotFound,
		block.ErrBusy:            codes.FailedPrecondition,
		ErrUnavailable:           codes.Unavailable,
		errPending:               codes.Aborted,
		errBadToken:              codes.Aborted,
		errPrecondition:          codes.FailedPrecondition,
		errPanic:                 codes.Internal,
		context.Canceled:         codes.Canceled,
		context.DeadlineExceeded: codes.DeadlineExceeded,
		syscall.ENOSPC:           codes.ResourceExhausted,
		syscall.EDQUOT:           codes.ResourceExhausted,
		syscall.EROFS:            codes.FailedPrecondition,
		fs.ErrInvalid:            codes.InvalidArgument,
		errors.ErrUnsupported:    codes.InvalidArgument,
		fs.ErrNotExist:           codes.Internal,
		syscall.EIO:              codes.Internal,
		errors.New("something"):  codes.Internal,
	} {
		err := fmt.Errorf("doing this to that: %w", sentinel)
		got := toStatus(err)
		wantCode(t, sentinel.Error(), got, want)
		if message := status.Convert(got).Message(); message != err.Error() {
			t.Errorf("message %q, want %q", message, err)
		}
	}
	if toStatus(nil) != nil {
		t.Error("nil became an error")
	}
	own := status.Error(codes.Unimplemented, "no such method")
	if got := toStatus(own); got != own {
		t.Errorf("a status became %v", got)
	}
	both := fmt.Errorf("%w: %w", ErrUnavailable, block.ErrNotFound)
	wantCode(t, "the first of the table decides", toStatus(both), codes.Unavailable)
}

func TestIntercept_Panic(t *testing.T) {
	b := newBench(t)
	b.store.volumes["v"] = nil // a map entry that the fake trips over
	_, err := b.controller.ListVolumes(t.Context(), nil)
	wantCode(t, "ListVolumes", err, codes.Internal)
	if !strings.Contains(err.Error(), "internal error") {
		t.Errorf("got %v", err)
	}
}

package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// ErrNotRunning says that no supervisor answers on a socket: it is not running, or
// being restarted. Trying again later is right.
var ErrNotRunning = errors.New("no supervisor answers")

// wireError is an error on its way between processes: a sentence, and the name of
// the sentinel it wraps ("" if none).
type wireError struct {
	Message string `json:"error"`
	Kind    string `json:"kind,omitempty"`
}

// kinds names the sentinels on the wire, in the order in which they are looked for:
// what wraps others comes first, as in block.Errno.
var kinds = []struct {
	sentinel error
	name     string
	status   int
}{
	{block.ErrPoisoned, "poisoned", http.StatusInternalServerError},
	{block.ErrFenced, "fenced", http.StatusConflict},
	{block.ErrCorrupt, "corrupt", http.StatusUnprocessableEntity},
	{block.ErrNoSpace, "no-space", http.StatusInsufficientStorage},
	{block.ErrReadOnly, "read-only", http.StatusForbidden},
	{block.ErrOutOfRange, "out-of-range", http.StatusBadRequest},
	{block.ErrInvalid, "invalid", http.StatusBadRequest},
	{block.ErrUnsupported, "unsupported", http.StatusNotImplemented},
	{block.ErrLocked, "locked", http.StatusConflict},
	{block.ErrBusy, "busy", http.StatusConflict},
	{block.ErrExists, "exists", http.StatusConflict},
	{block.ErrNotFound, "not-found", http.StatusNotFound},
	{block.ErrClosed, "closed", http.StatusServiceUnavailable},
	{ErrNotRunning, "not-running", http.StatusServiceUnavailable},
	{context.DeadlineExceeded, "timeout", http.StatusGatewayTimeout},
}

// toWire makes err ready to be sent; nil stays nil.
func toWire(err error) *wireError {
	if err == nil {
		return nil
	}
	w := &wireError{Message: err.Error()}
	for _, k := range kinds {
		if errors.Is(err, k.sentinel) {
			w.Kind = k.name
			break
		}
	}
	return w
}

// err turns what was received back into an error that wraps its sentinel.
func (w *wireError) err() error {
	if w == nil {
		return nil
	}
	for _, k := range kinds {
		if k.name == w.Kind {
			return &remoteError{message: w.Message, sentinel: k.sentinel}
		}
	}
	return errors.New(w.Message)
}

// httpStatus is the status code an error is sent with.
func (w *wireError) httpStatus() int {
	for _, k := range kinds {
		if k.name == w.Kind {
			return k.status
		}
	}
	return http.StatusInternalServerError
}

// remoteError reads as the other process wrote it, which names the sentinel already.
type remoteError struct {
	message  string
	sentinel error
}

func (e *remoteError) Error() string { return e.message }
func (e *remoteError) Unwrap() error { return e.sentinel }

// marshal encodes one of this package's own types, which cannot fail.
func marshal(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

package store

import (
	"errors"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// problemKinds are the sentinels that are kept when a failure is told through a record.
var problemKinds = []struct {
	name string
	err  error
}{
	{"no-space", block.ErrNoSpace},
	{"read-only", block.ErrReadOnly},
	{"unsupported", block.ErrUnsupported},
	{"invalid", block.ErrInvalid},
	{"out-of-range", block.ErrOutOfRange},
	{"corrupt", block.ErrCorrupt},
	{"poisoned", block.ErrPoisoned},
	{"locked", block.ErrLocked},
	{"busy", block.ErrBusy},
}

// newProblem keeps err for another process.
func newProblem(err error) *Problem {
	if isFull(err) {
		err = fmt.Errorf("%w: %w", block.ErrNoSpace, err)
	}
	p := &Problem{Text: err.Error(), At: now()}
	for _, k := range problemKinds {
		if errors.Is(err, k.err) {
			p.Kind = k.name
			break
		}
	}
	return p
}

// err makes an error of it again.
func (p *Problem) err() error {
	for _, k := range problemKinds {
		if k.name == p.Kind {
			return &toldError{text: p.Text, kind: k.err}
		}
	}
	return errors.New(p.Text)
}

// toldError is a failure of another process.
type toldError struct {
	text string
	kind error
}

func (e *toldError) Error() string { return e.text }
func (e *toldError) Unwrap() error { return e.kind }

package supervisor

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach"
)

// probed is a transport that can only be probed.
type probed struct {
	attach.Transport
	name       string
	problem    error
	reluctance error
}

func (p *probed) Name() string                     { return p.name }
func (p *probed) Probe(context.Context) error      { return p.problem }
func (p *probed) Reluctance(context.Context) error { return p.reluctance }

// A transport that works, but not as well as others do, is taken only by its name; that
// it was passed over, and why, is said where nothing else works.
func TestSupervisor_ReluctantTransport(t *testing.T) {
	nbd := &probed{name: "nbd", problem: errors.New("no module")}
	ublk := &probed{name: "ublk", reluctance: errors.New("can't resize")}
	fuse := &probed{name: "fuse"}
	s, err := New(Config{StateDir: t.TempDir(), Transports: []attach.Transport{nbd, ublk, fuse}})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]attach.Transport{"": fuse, "ublk": ublk, "fuse": fuse} {
		if got, err := s.pickTransport(t.Context(), name); got != want {
			t.Errorf("transport %q: %v, %v", name, got, err)
		}
	}
	fuse.problem = errors.New("too old")
	s.works = map[string]bool{}
	_, err = s.pickTransport(t.Context(), "")
	if !errors.Is(err, block.ErrUnsupported) || !strings.Contains(err.Error(), "can't resize") {
		t.Errorf("nothing but a reluctant transport: %v, want ErrUnsupported that says why", err)
	}
	ublk.reluctance = nil
	if got, err := s.pickTransport(t.Context(), ""); got != attach.Transport(ublk) {
		t.Errorf("a transport that is not reluctant any more: %v, %v", got, err)
	}
}
